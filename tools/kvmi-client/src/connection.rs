// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A connection to a hooked VM: commands, replies, events.

use std::{collections::VecDeque, os::fd::AsFd, time::Duration};

use kvmi_abi::{
    guest_event::NewValueReply,
    id::VCPU_EVENT,
    vcpu::EventReply,
    vcpu_request::Action,
    wire::{Header, VcpuHeader, MAX_MSG_SIZE},
    Command, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    decoder::Message,
    error::{Error, ProtocolError, Result},
    event::{Event, VcpuEvent},
    io::Deadline,
    link::Link,
};

/// How long a command may take unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

/// Events that are kept for [`Connection::next_event`]; a well-behaved host has at most one per
/// vCPU, and one of the VM, under way.
pub(crate) const MAX_WAITING_EVENTS: usize = 4096;

/// A tool's end of the socket, after the handshake if there was one.
///
/// `S` is a connected stream socket: a `UnixStream`, a vsock stream or any file descriptor of one.
#[derive(Debug)]
pub struct Connection<S: AsFd> {
    pub(crate) link: Link<S>,
    events: VecDeque<Event>,
    timeout: Option<Duration>,
    usable: bool,
    outgoing: Vec<u8>,
}

impl<S: AsFd> Connection<S> {
    /// Takes over a connected socket.
    pub fn new(stream: S) -> Self {
        Self::on(Link::own(stream))
    }

    pub(crate) fn on(link: Link<S>) -> Self {
        Self {
            link,
            events: VecDeque::new(),
            timeout: Some(DEFAULT_TIMEOUT),
            usable: true,
            outgoing: Vec::new(),
        }
    }

    /// Sets how long sending a message and waiting for its reply may take each; `None` is for
    /// ever.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    /// The socket.
    pub fn stream(&self) -> &S {
        self.link.stream()
    }

    /// Gives a command whose request consists of `parts`, and returns the data of the reply.
    ///
    /// For what this version of the crate has no method for; the others are safer to use.
    pub fn command(&mut self, command: Command, parts: &[&[u8]]) -> Result<Vec<u8>> {
        self.exchange(|connection| {
            let header = connection.queue(command, parts)?;
            connection.flush()?;
            connection.reply_to(&header)
        })?
        .map_err(|error| Error::Kvmi(error, command))
    }

    /// As [`Self::command`], for a command of the vCPU with the index `vcpu`.
    ///
    /// A vCPU serves commands on its own thread and inside `KVM_RUN` only. While the VMM is busy
    /// with the vCPU this takes longer, and as long as the VMM has stopped the VM, for ever: the
    /// error is [`Error::VcpuTimeout`] then.
    pub fn vcpu_command(
        &mut self,
        vcpu: u16,
        command: Command,
        parts: &[&[u8]],
    ) -> Result<Vec<u8>> {
        let header = vcpu_header(vcpu);
        let mut all = vec![header.as_bytes()];
        all.extend(parts);
        self.command(command, &all).map_err(|error| match error {
            Error::Timeout => Error::VcpuTimeout { vcpu, command },
            error => error,
        })
    }

    /// Runs an exchange of messages; if it fails, or panics, the connection is not usable any
    /// more, for nobody knows what is still under way.
    pub(crate) fn exchange<R>(&mut self, run: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        if !self.usable {
            return Err(Error::Unusable);
        }
        self.usable = false;
        let outcome = run(self);
        self.usable = outcome.as_ref().err().is_none_or(Error::is_recoverable);
        outcome
    }

    /// Puts a command into the buffer of what is to be sent; returns its header.
    pub(crate) fn queue(&mut self, command: Command, parts: &[&[u8]]) -> Result<Header> {
        let len = parts.iter().map(|part| part.len()).sum();
        let size = message_size(len)?;
        let header = Header {
            id: command.id(),
            size,
            seq: self.link.number(),
        };
        self.append(&header, parts);
        Ok(header)
    }

    /// Receives the reply to a command, putting aside events that come in between.
    ///
    /// Replies come in the order of the commands of the VM. Those of vCPUs could overtake them and
    /// one another, so a command of a vCPU must be the only one under way.
    pub(crate) fn reply_to(
        &mut self,
        header: &Header,
    ) -> Result<std::result::Result<Vec<u8>, KvmiError>> {
        let deadline = Deadline::after(self.timeout);
        loop {
            let message = self.receive(deadline)?;
            if let Some(event) = Event::decode(&message)? {
                self.keep(event)?;
                continue;
            }
            if message.header.id != header.id || message.header.seq != header.seq {
                return Err(unexpected(&message).into());
            }
            return Ok(message.reply()?.map(<[u8]>::to_vec));
        }
    }

    fn keep(&mut self, event: Event) -> Result<()> {
        if self.events.len() >= MAX_WAITING_EVENTS {
            return Err(ProtocolError::TooManyEvents.into());
        }
        self.events.push_back(event);
        Ok(())
    }

    /// Returns the next event, waiting for it if need be; after `timeout` without one the error is
    /// [`Error::Timeout`], which does not harm the connection.
    pub fn next_event(&mut self, timeout: Option<Duration>) -> Result<Event> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        let message = self.receive(Deadline::after(timeout))?;
        self.event_only(&message)
    }

    /// Returns the first event that is `wanted`, as [`Self::next_event`] does; the others stay for
    /// later.
    pub fn wait_for_event(
        &mut self,
        timeout: Option<Duration>,
        wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event> {
        self.wait_for_event_until(Deadline::after(timeout), wanted)
    }

    /// As [`Self::wait_for_event`], until a point in time.
    pub(crate) fn wait_for_event_until(
        &mut self,
        deadline: Deadline,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event> {
        let waiting = self.events.iter().position(&mut wanted);
        if let Some(event) = waiting.and_then(|at| self.events.remove(at)) {
            return Ok(event);
        }
        loop {
            let message = self.receive(deadline)?;
            let event = self.event_only(&message)?;
            if wanted(&event) {
                return Ok(event);
            }
            self.keep(event).inspect_err(|_| self.usable = false)?;
        }
    }

    /// Replies to an event of a vCPU, which then runs on. That is due once for each event.
    ///
    /// If the guest writes a register it gets what the guest has written; see
    /// [`Self::reply_value`] for another value. [`Action::Retry`] is for events that interrupt an
    /// instruction; the host closes the connection if it gets that for another one.
    pub fn reply_event(&mut self, event: &VcpuEvent, action: Action) -> Result<()> {
        self.send_reply(event, action, event.kind.new_value())
    }

    /// Replies to an event of a register that the guest writes that the register shall get `value`
    /// instead. The old one leaves it as it is; one that the guest could not have written is
    /// refused as if the guest had.
    pub fn reply_value(&mut self, event: &VcpuEvent, value: u64) -> Result<()> {
        match event.kind.new_value() {
            Some(_) => self.send_reply(event, Action::Continue, Some(value)),
            None => Err(Error::NoValue(event.kind.id())),
        }
    }

    fn send_reply(&mut self, event: &VcpuEvent, action: Action, value: Option<u64>) -> Result<()> {
        let reply = EventReply {
            vcpu: vcpu_header(event.vcpu),
            action: action.code(),
            event: event.kind.id(),
            ..Default::default()
        };
        let value = value.map(|new_val| NewValueReply { new_val });
        let value = value.as_ref().map_or(&[][..], |value| value.as_bytes());
        let payload = [reply.as_bytes(), value].concat();
        let header = Header {
            id: VCPU_EVENT,
            size: message_size(payload.len())?,
            seq: event.seq,
        };
        self.exchange(|connection| connection.send_raw(&header, &payload))
    }

    /// Gives up the connection. The host then lets all vCPUs run on, those included that wait for
    /// a reply to an event or are still to be paused.
    pub fn hang_up(&mut self) {
        self.usable = false;
        self.link.hang_up();
    }

    /// Returns the next event if there is one already.
    pub fn try_event(&mut self) -> Result<Option<Event>> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let message = self.link.try_receive()?;
        message.map(|message| self.event_only(&message)).transpose()
    }

    fn event_only(&mut self, message: &Message) -> Result<Event> {
        match Event::decode(message) {
            Ok(Some(event)) => Ok(event),
            Ok(None) => Err(self.violated(unexpected(message))),
            Err(error) => Err(self.violated(error)),
        }
    }

    /// Gives up the connection because of what was received.
    pub(crate) fn violated(&mut self, error: ProtocolError) -> Error {
        self.usable = false;
        error.into()
    }

    /// Sends `header`, whatever its size says, and `payload`: for tests of the other side. What
    /// the other side answers is for [`Self::receive_raw`].
    pub fn send_raw(&mut self, header: &Header, payload: &[u8]) -> Result<()> {
        self.append(header, &[payload]);
        self.flush()
    }

    /// Receives one message, event or reply, in the order in which they arrive: for tests of the
    /// other side. Events that commands have put aside are left to [`Self::next_event`].
    pub fn receive_raw(&mut self) -> Result<Message> {
        self.receive(Deadline::after(self.timeout))
    }

    fn append(&mut self, header: &Header, parts: &[&[u8]]) {
        self.outgoing.extend_from_slice(header.as_bytes());
        for part in parts {
            self.outgoing.extend_from_slice(part);
        }
    }

    /// Sends what is to be sent, as one piece.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let deadline = Deadline::after(self.timeout);
        let sent = self.link.send(&self.outgoing, deadline);
        self.outgoing.clear();
        sent
    }

    fn receive(&mut self, deadline: Deadline) -> Result<Message> {
        self.link.receive(deadline)
    }
}

fn vcpu_header(vcpu: u16) -> VcpuHeader {
    VcpuHeader {
        vcpu,
        ..Default::default()
    }
}

/// The size of a message's payload as its header has it.
fn message_size(len: usize) -> Result<u16> {
    u16::try_from(len)
        .ok()
        .filter(|_| len <= MAX_MSG_SIZE)
        .ok_or(Error::Range)
}

fn unexpected(message: &Message) -> ProtocolError {
    ProtocolError::UnexpectedMessage {
        id: message.header.id,
        seq: message.header.seq,
    }
}
