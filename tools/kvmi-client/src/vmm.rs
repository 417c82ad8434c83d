// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The VMM's part of the handshake.

use std::{os::fd::AsFd, time::Duration};

use kvmi_abi::handshake::{ToolHello, VmmHello};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::{
    cookie::Cookie,
    error::{Error, ProtocolError, Result},
    io::{recv_exact, send_all, Deadline},
};

/// Tells the tool at the other end of `stream` which VM it is going to see, and checks that it
/// knows the secret behind `cookie`, if there is one.
///
/// As many bytes are sent as `hello.struct_size` says. Not a byte more than the tool's part is
/// received, for what follows is for the kernel.
pub fn handshake(
    stream: impl AsFd,
    hello: &VmmHello,
    cookie: Option<&Cookie>,
    timeout: Duration,
) -> Result<()> {
    let deadline = Deadline::after(Some(timeout));
    let wrong_size = |size| Error::Protocol(ProtocolError::HandshakeSize(size));

    let bytes = usize::try_from(hello.struct_size)
        .ok()
        .and_then(|size| hello.as_bytes().get(..size))
        .ok_or(wrong_size(hello.struct_size))?;
    send_all(&stream, bytes, deadline)?;

    let mut answer = [0; ToolHello::SIZE];
    recv_exact(&stream, &mut answer[..4], deadline)?;
    let (size, _) = u32::read_from_prefix(&answer).map_err(|_| Error::Closed)?;
    if !ToolHello::accepts(size) {
        return Err(wrong_size(size));
    }
    recv_exact(&stream, &mut answer[4..], deadline)?;
    let surplus = usize::try_from(size)
        .unwrap_or_default()
        .saturating_sub(ToolHello::SIZE);
    recv_exact(&stream, &mut vec![0; surplus], deadline)?;

    let (answer, _) = ToolHello::read_from_prefix(&answer).map_err(|_| Error::Closed)?;
    match cookie {
        Some(cookie) if !cookie.matches(&answer.cookie_hash) => Err(Error::Cookie),
        _ => Ok(()),
    }
}
