// SPDX-License-Identifier: GPL-2.0

//! The connection to a tool.
//!
//! One thread receives, several send. A message is sent as a whole or the connection is shut down,
//! so that the stream is never out of step.

use kernel::{
    new_condvar,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        CondVar,
        CondVarTimeoutResult,
        Mutex, //
    },
    time::msecs_to_jiffies, //
};
use kvmi_abi::{
    event::{
        vcpu_event_header,
        EventSeq,
        VmEventMessage, //
    },
    wire::{
        Header,
        ReplyHead, //
    },
    Event,
    KvmiError, //
};
use kvmi_common::socket::{
    StreamSocket,
    Wait, //
};
use zerocopy::{
    FromZeros,
    IntoBytes, //
};

use crate::trace::Trace;

/// How long the sender of an event of the VM waits for its turn, in milliseconds. It is a thread
/// of the VMM, which must not hang because a tool does not read.
const EVENT_PATIENCE_MS: u32 = 1000;

/// What senders share.
#[derive(Default)]
struct Outgoing {
    /// Somebody is sending.
    busy: bool,
    seq: EventSeq,
}

/// A connection to a tool.
#[pin_data]
pub(crate) struct Connection {
    socket: StreamSocket,
    trace: Trace,
    #[pin]
    outgoing: Mutex<Outgoing>,
    /// Notified when `outgoing` is not busy any more.
    #[pin]
    turn: CondVar,
    closed: Atomic<bool>,
}

/// The right to send. Not a lock guard, since sending may take as long as the tool likes and a
/// waiting thread must stay interruptible.
struct Turn<'a>(&'a Connection);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.outgoing.lock().busy = false;
        self.0.turn.notify_one();
    }
}

impl Connection {
    /// Creates a connection over `socket`.
    pub(crate) fn new(socket: StreamSocket, trace: Trace) -> impl PinInit<Self> {
        pin_init!(Self {
            socket,
            trace,
            outgoing <- new_mutex!(Outgoing::default(), "Connection::outgoing"),
            turn <- new_condvar!("Connection::turn"),
            closed: Atomic::new(false),
        })
    }

    /// Whether the connection is over.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// Ends the connection, and with it every reception and transmission under way.
    pub(crate) fn close(&self) {
        self.closed.store(true, Relaxed);
        self.socket.shutdown();
    }

    /// Drops what was received and not read. After [`Self::close`], when nothing more can arrive.
    ///
    /// Descriptors that were passed along are among that, and may be what keeps the VM alive.
    pub(crate) fn discard(&self, scratch: &mut [u8]) {
        while self.socket.recv_now(scratch) {}
    }

    /// Receives the header of the next message, or `None` at the end of the stream.
    pub(crate) fn recv_header(&self) -> Result<Option<Header>> {
        let mut header = Header::new_zeroed();
        let more = self.socket.recv_exact(header.as_mut_bytes())?;
        Ok(more.then_some(header))
    }

    /// Receives the payload of a message, all of `buf`.
    pub(crate) fn recv_payload(&self, buf: &mut [u8]) -> Result {
        if buf.is_empty() || self.socket.recv_exact(buf)? {
            Ok(())
        } else {
            Err(EPIPE)
        }
    }

    /// Whether the tool has closed its end, or the connection is over.
    pub(crate) fn peer_has_hung_up(&self) -> bool {
        self.socket.peer_has_hung_up()
    }

    /// Sends the reply to `request`; closes the connection if that fails.
    ///
    /// Sleeps until the tool reads, the connection is closed or a signal arrives: then it fails
    /// with `EINTR`, and nothing was sent.
    pub(crate) fn reply(&self, request: &Header, result: Result<&[u8], KvmiError>) -> Result {
        let (head, data) = match result {
            Ok(data) => (
                ReplyHead::success(request, data.len()).ok_or(EMSGSIZE)?,
                data,
            ),
            Err(error) => (ReplyHead::failure(request, error), &[][..]),
        };
        let _turn = self.wait_for_turn()?;
        self.trace.reply(request, &result);
        self.send([head.as_bytes(), data], Wait::ForRoom)
    }

    /// Sends an event of the VM; closes the connection if the tool has left no room for it.
    ///
    /// Sleeps [`EVENT_PATIENCE_MS`] at most. Fails with `EAGAIN` if the tool does not read.
    pub(crate) fn send_vm_event(&self, event: Event) -> Result {
        let _turn = self.wait_for_turn_shortly()?;
        let seq = self.outgoing.lock().seq.next_number();
        self.trace.event(None, event, seq);
        self.send([VmEventMessage::new(event, seq).as_bytes()], Wait::Never)?;
        self.outgoing.lock().seq.advance();
        Ok(())
    }

    /// Sends an event of a vCPU. `expect` gets its sequence number before it is sent, since the
    /// reply may be there before this returns.
    ///
    /// Sleeps as [`Self::reply`] does, and fails in the same way.
    pub(crate) fn send_vcpu_event(
        &self,
        vcpu: u16,
        event: Event,
        body: &[u8],
        expect: impl FnOnce(u32),
    ) -> Result {
        let _turn = self.wait_for_turn()?;
        let seq = self.outgoing.lock().seq.next_number();
        let header = vcpu_event_header(body.len(), seq).ok_or(EMSGSIZE)?;
        expect(seq);
        self.trace.event(Some(vcpu), event, seq);
        self.send([header.as_bytes(), body], Wait::ForRoom)?;
        self.outgoing.lock().seq.advance();
        Ok(())
    }

    /// Sends while the caller has the turn. An interrupted transmission leaves no trace; after any
    /// other failure the stream is out of step.
    fn send<const N: usize>(&self, parts: [&[u8]; N], wait: Wait) -> Result {
        self.socket.send(parts, wait).inspect_err(|e| {
            if *e != EINTR {
                self.close();
            }
        })
    }

    fn wait_for_turn(&self) -> Result<Turn<'_>> {
        let mut outgoing = self.outgoing.lock();
        while outgoing.busy {
            // Who was notified has to take the turn: the notification is not for anybody else.
            if self.turn.wait_interruptible(&mut outgoing) && outgoing.busy {
                return Err(EINTR);
            }
        }
        outgoing.busy = true;
        Ok(Turn(self))
    }

    fn wait_for_turn_shortly(&self) -> Result<Turn<'_>> {
        let mut outgoing = self.outgoing.lock();
        let mut left = msecs_to_jiffies(EVENT_PATIENCE_MS);
        while outgoing.busy {
            // As above.
            match self.turn.wait_interruptible_timeout(&mut outgoing, left) {
                CondVarTimeoutResult::Woken { jiffies } => left = jiffies,
                CondVarTimeoutResult::Timeout if outgoing.busy => return Err(EAGAIN),
                CondVarTimeoutResult::Signal { .. } if outgoing.busy => return Err(EINTR),
                _ => {}
            }
        }
        outgoing.busy = true;
        Ok(Turn(self))
    }
}
