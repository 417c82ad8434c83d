// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Sending and receiving with a deadline.
//!
//! The mode of the socket is left alone, since whoever else has a duplicate of it shares that.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{poll, PollFd, PollFlags, Timespec},
    io::Errno,
    net::{recv, send, RecvFlags, SendFlags},
};

use crate::error::{Error, Result};

/// When an operation has to be done; `None` means never.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    /// The deadline that is `timeout` away, if any.
    pub(crate) fn after(timeout: Option<Duration>) -> Self {
        // A time too far away to be told is as good as none.
        Self(timeout.and_then(|t| Instant::now().checked_add(t)))
    }

    /// How much time is left, if it is limited.
    pub(crate) fn left(self) -> Option<Duration> {
        Some(self.0?.saturating_duration_since(Instant::now()))
    }

    fn remaining(self) -> Option<Timespec> {
        let left = self.left()?;
        Some(Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        })
    }
}

/// Waits until `fd` is ready, in error or hung up.
fn wait(fd: impl AsFd, flags: PollFlags, deadline: Deadline) -> Result<()> {
    loop {
        let mut fds = [PollFd::new(&fd, flags)];
        match poll(&mut fds, deadline.remaining().as_ref()) {
            Ok(0) => return Err(Error::Timeout),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Sends all of `bytes`.
pub(crate) fn send_all(fd: impl AsFd, mut bytes: &[u8], deadline: Deadline) -> Result<()> {
    while !bytes.is_empty() {
        match send(&fd, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(&fd, PollFlags::OUT, deadline)?,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Receives what is there; 0 bytes are the end of the stream.
pub(crate) fn recv_some(fd: impl AsFd, buffer: &mut [u8], deadline: Deadline) -> Result<usize> {
    loop {
        wait(&fd, PollFlags::IN, deadline)?;
        if let Some(received) = recv_now(&fd, buffer)? {
            return Ok(received);
        }
    }
}

/// As [`recv_some`], but gives `None` when nothing is there.
pub(crate) fn recv_now(fd: impl AsFd, buffer: &mut [u8]) -> Result<Option<usize>> {
    loop {
        match recv(&fd, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((received, _)) => return Ok(Some(received)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Fills `buffer` and takes no byte more from the stream.
pub(crate) fn recv_exact(fd: impl AsFd, mut buffer: &mut [u8], deadline: Deadline) -> Result<()> {
    while !buffer.is_empty() {
        match recv_some(&fd, buffer, deadline)? {
            0 => return Err(Error::Closed),
            received => buffer = buffer.get_mut(received..).unwrap_or_default(),
        }
    }
    Ok(())
}
