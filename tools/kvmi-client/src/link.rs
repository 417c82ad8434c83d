// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a connection receives from and sends to: a socket of its own, or a share of one.

use std::os::fd::AsFd;

use rustix::net::{shutdown, Shutdown};

use crate::{
    decoder::{Decoder, Message},
    error::{Error, ProtocolError, Result},
    hub::Share,
    io::{recv_now, recv_some, send_all, Deadline},
};

/// Bytes that are received at once.
const INCOMING: usize = 64 * 1024;

/// Messages from a socket.
#[derive(Debug)]
pub(crate) struct Incoming {
    decoder: Decoder,
    buffer: Vec<u8>,
}

impl Incoming {
    pub(crate) fn new() -> Self {
        Self {
            decoder: Decoder::default(),
            buffer: vec![0; INCOMING],
        }
    }

    /// Receives a message. What has arrived of an incomplete one survives a time-out.
    pub(crate) fn receive(&mut self, stream: impl AsFd, deadline: Deadline) -> Result<Message> {
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(message);
            }
            let received = recv_some(&stream, &mut self.buffer, deadline)?;
            self.received(received)?;
        }
    }

    /// Receives a message if there is one already.
    fn try_receive(&mut self, stream: impl AsFd) -> Result<Option<Message>> {
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(Some(message));
            }
            match recv_now(&stream, &mut self.buffer)? {
                None => return Ok(None),
                Some(received) => self.received(received)?,
            }
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
            .feed(self.buffer.get(..len).unwrap_or_default());
        Ok(())
    }
}

/// A socket of its own, or a share of one.
#[derive(Debug)]
pub(crate) enum Link<S: AsFd> {
    Own {
        stream: S,
        incoming: Incoming,
        /// Number of the last command.
        seq: u32,
    },
    Shared(Share<S>),
}

impl<S: AsFd> Link<S> {
    pub(crate) fn own(stream: S) -> Self {
        Self::Own {
            stream,
            incoming: Incoming::new(),
            seq: 0,
        }
    }

    pub(crate) fn stream(&self) -> &S {
        match self {
            Self::Own { stream, .. } => stream,
            Self::Shared(share) => share.stream(),
        }
    }

    /// Shuts the socket down in both directions.
    pub(crate) fn hang_up(&self) {
        match self {
            // It fails if the other side has hung up, which is just as well.
            Self::Own { stream, .. } => drop(shutdown(stream, Shutdown::Both)),
            Self::Shared(share) => share.hang_up(),
        }
    }

    /// Numbers a command that is going to be sent.
    pub(crate) fn number(&mut self) -> u32 {
        match self {
            Self::Own { seq, .. } => {
                *seq = seq.wrapping_add(1);
                *seq
            }
            Self::Shared(share) => share.number(),
        }
    }

    /// Sends whole messages.
    pub(crate) fn send(&self, bytes: &[u8], deadline: Deadline) -> Result<()> {
        match self {
            Self::Own { stream, .. } => send_all(stream, bytes, deadline),
            Self::Shared(share) => share.send(bytes, deadline),
        }
    }

    /// Receives a message.
    pub(crate) fn receive(&mut self, deadline: Deadline) -> Result<Message> {
        match self {
            Self::Own {
                stream, incoming, ..
            } => incoming.receive(stream, deadline),
            Self::Shared(share) => share.receive(deadline),
        }
    }

    /// Receives a message if there is one already.
    pub(crate) fn try_receive(&mut self) -> Result<Option<Message>> {
        match self {
            Self::Own {
                stream, incoming, ..
            } => incoming.try_receive(stream),
            Self::Shared(share) => share.try_receive(),
        }
    }
}
