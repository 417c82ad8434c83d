// SPDX-License-Identifier: GPL-2.0

//! The connection to a tool.
//!
//! One thread receives, several send. A message is sent as a whole before the next one, or the
//! connection is shut down, so that the stream is never out of step.

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
    time::{
        Instant,
        Jiffies,
        Monotonic, //
    }, //
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
    total_len,
    StreamSocket, //
};
use zerocopy::{
    FromZeros,
    IntoBytes, //
};

use crate::{
    clock::{
        jiffies_left,
        time_left, //
    },
    trace::Trace, //
};

/// How long the sender of an event of the VM waits for its turn, in milliseconds. It is a thread
/// of the VMM, which must not hang because a tool does not read.
const EVENT_PATIENCE_MS: u32 = 1000;

/// Tells how long a sender may go on waiting; see [`jiffies_left`].
pub(crate) type Left<'a> = &'a dyn Fn() -> Jiffies;

/// What senders share.
#[derive(Default)]
struct Outgoing {
    /// Somebody is sending.
    busy: bool,
    seq: EventSeq,
    /// The rest of a message whose sender had to leave.
    rest: KVec<u8>,
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
    pub(crate) fn discard(&self) {
        let mut scratch = [0; 256];
        while self.socket.recv_now(&mut scratch) {}
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
    /// Sleeps until the tool reads, the connection is closed, `left` says 0 or a signal arrives:
    /// then it fails with `EINTR`, and nothing was sent.
    pub(crate) fn reply(
        &self,
        request: &Header,
        result: Result<&[u8], KvmiError>,
        left: Left<'_>,
    ) -> Result {
        let (head, data) = match result {
            Ok(data) => (
                ReplyHead::success(request, data.len()).ok_or(EMSGSIZE)?,
                data,
            ),
            Err(error) => (ReplyHead::failure(request, error), &[][..]),
        };
        let sent = self.turn(left).and_then(|turn| {
            self.trace.reply(request, &result);
            turn.send([head.as_bytes(), data], left)
        });
        self.close_on_failure(sent)
    }

    /// Sends an event of the VM; closes the connection if the tool has left no room for it.
    ///
    /// Sleeps [`EVENT_PATIENCE_MS`] at most. Fails with `ETIMEDOUT` if the tool does not read.
    pub(crate) fn send_vm_event(&self, event: Event) -> Result {
        let since = Instant::<Monotonic>::now();
        let turn = self.turn(&|| jiffies_left(Some(time_left(EVENT_PATIENCE_MS, since))))?;
        let seq = self.outgoing.lock().seq.next_number();
        self.trace.event(None, event, seq);
        let sent = turn.send([VmEventMessage::new(event, seq).as_bytes()], &|| 0);
        self.close_on_failure(sent)?;
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
        left: Left<'_>,
        expect: impl FnOnce(u32),
    ) -> Result {
        let sent = self.turn(left).and_then(|turn| {
            let seq = self.outgoing.lock().seq.next_number();
            let header = vcpu_event_header(body.len(), seq).ok_or(EMSGSIZE)?;
            expect(seq);
            self.trace.event(Some(vcpu), event, seq);
            turn.send([header.as_bytes(), body], left)?;
            self.outgoing.lock().seq.advance();
            Ok(())
        });
        self.close_on_failure(sent)
    }

    /// Whether a part of a message is still to be sent.
    pub(crate) fn is_unfinished(&self) -> bool {
        !self.outgoing.lock().rest.is_empty()
    }

    /// Sends what is left of a message. Sleeps as [`Self::reply`] does, and fails in the same way.
    pub(crate) fn finish(&self, left: Left<'_>) -> Result {
        let finished = self.turn(left).map(drop);
        self.close_on_failure(finished)
    }

    /// Has those who wait for their turn, or for room, look at the time that they have left.
    pub(crate) fn look_at_the_clock(&self) {
        self.turn.notify_all();
        self.socket.wake();
    }

    /// Closes the connection upon a failure: the stream is out of step, or the tool too slow. A
    /// signal is none.
    fn close_on_failure(&self, result: Result) -> Result {
        result.inspect_err(|e| {
            if *e != EINTR {
                self.close();
            }
        })
    }

    /// Waits for the turn, and finishes the message that somebody had to leave. Fails with
    /// `ETIMEDOUT` when `left` says 0, `EINTR` when a signal is pending: nothing is lost then.
    fn turn(&self, left: Left<'_>) -> Result<Turn<'_>> {
        let mut outgoing = self.outgoing.lock();
        while outgoing.busy {
            // Who was notified has to take the turn: the notification is not for anybody else.
            match self.turn.wait_interruptible_timeout(&mut outgoing, left()) {
                CondVarTimeoutResult::Signal { .. } if outgoing.busy => return Err(EINTR),
                CondVarTimeoutResult::Timeout if outgoing.busy => return Err(ETIMEDOUT),
                _ => {}
            }
        }
        outgoing.busy = true;
        drop(outgoing);
        let turn = Turn(self);
        turn.finish(left)?;
        Ok(turn)
    }
}

impl Turn<'_> {
    /// Sends a message.
    ///
    /// If a signal arrives in the middle of it, the rest is left to whoever sends next. Fails with
    /// `EINTR` if it arrives before that, `ETIMEDOUT` when `left` says 0.
    fn send<const N: usize>(&self, mut parts: [&[u8]; N], left: Left<'_>) -> Result {
        let len = total_len(&parts);
        match self.0.socket.send(&mut parts, left) {
            Err(e) if e == EINTR && total_len(&parts) < len => self.leave(&parts),
            result => result,
        }
    }

    /// Sends what is left of a message, if anything is; leaves again what cannot be sent.
    fn finish(&self, left: Left<'_>) -> Result {
        let rest = core::mem::take(&mut self.0.outgoing.lock().rest);
        let mut parts = [&rest[..]];
        self.0.socket.send(&mut parts, left).or_else(|e| {
            self.leave(&parts)?;
            Err(e)
        })
    }

    /// Leaves the rest of a message to whoever sends next. Fails with `ENOMEM`.
    fn leave(&self, parts: &[&[u8]]) -> Result {
        let mut rest = KVec::with_capacity(total_len(parts), GFP_KERNEL)?;
        for part in parts {
            rest.extend_from_slice(part, GFP_KERNEL)?;
        }
        self.0.outgoing.lock().rest = rest;
        Ok(())
    }
}
