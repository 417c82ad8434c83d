// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A connection to a hooked VM: commands, replies, events.

use std::{collections::VecDeque, os::fd::AsFd, time::Duration};

use kvmi_abi::{wire::Header, wire::MAX_MSG_SIZE, Command, KvmiError};
use zerocopy::IntoBytes as _;

use crate::{
    decoder::{Decoder, Message},
    error::{Error, ProtocolError, Result},
    event::Event,
    io::{recv_now, recv_some, send_all, Deadline},
};

/// How long a command may take unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

/// Events that are kept for [`Connection::next_event`]; a well-behaved host has at most one per
/// vCPU, and one of the VM, under way.
const MAX_WAITING_EVENTS: usize = 4096;

/// Bytes that are received at once.
const INCOMING: usize = 64 * 1024;

/// A tool's end of the socket, after the handshake if there was one.
///
/// `S` is a connected stream socket: a `UnixStream`, a vsock stream or any file descriptor of one.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    decoder: Decoder,
    events: VecDeque<Event>,
    seq: u32,
    timeout: Option<Duration>,
    usable: bool,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

impl<S: AsFd> Connection<S> {
    /// Takes over a connected socket.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            decoder: Decoder::default(),
            events: VecDeque::new(),
            seq: 0,
            timeout: Some(DEFAULT_TIMEOUT),
            usable: true,
            outgoing: Vec::new(),
            incoming: vec![0; INCOMING],
        }
    }

    /// Sets how long sending a message and waiting for its reply may take each; `None` is for
    /// ever.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    /// The socket.
    pub fn stream(&self) -> &S {
        &self.stream
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
        self.seq = self.seq.wrapping_add(1);
        let header = Header {
            id: command.id(),
            size,
            seq: self.seq,
        };
        self.append(&header, parts);
        Ok(header)
    }

    /// Receives the reply to a command, putting aside events that come in between. Replies come in
    /// the order of the commands.
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

    /// Returns the next event if there is one already.
    pub fn try_event(&mut self) -> Result<Option<Event>> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return self.event_only(&message).map(Some);
            }
            match recv_now(&self.stream, &mut self.incoming)? {
                None => return Ok(None),
                Some(received) => self.received(received)?,
            }
        }
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
        let sent = send_all(&self.stream, &self.outgoing, deadline);
        self.outgoing.clear();
        sent
    }

    /// Receives a message. What has arrived of an incomplete one survives a time-out.
    fn receive(&mut self, deadline: Deadline) -> Result<Message> {
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(message);
            }
            let received = recv_some(&self.stream, &mut self.incoming, deadline)?;
            self.received(received)?;
        }
    }

    /// Takes `len` bytes as received.
    fn received(&mut self, len: usize) -> Result<()> {
        if len == 0 {
            return Err(if self.decoder.is_inside_message() {
                ProtocolError::EndInsideMessage.into()
            } else {
                Error::Closed
            });
        }
        self.decoder
            .feed(self.incoming.get(..len).unwrap_or_default());
        Ok(())
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
