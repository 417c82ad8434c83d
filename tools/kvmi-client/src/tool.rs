// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The tool's part of the handshake.

use std::{os::fd::AsFd, time::Duration};

use kvmi_abi::handshake::{ToolHello, VmmHello};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::{
    cookie::Cookie,
    error::{Error, ProtocolError, Result},
    io::{recv_exact, send_all, Deadline},
};

/// Learns from the VMM at the other end of `stream` which VM it offers, and answers with `cookie`,
/// or zeros if there is none. Then the VMM hooks the VM, and a [`crate::Connection`] can be made
/// of the stream.
pub fn accept(stream: impl AsFd, cookie: Option<&Cookie>, timeout: Duration) -> Result<VmmHello> {
    let deadline = Deadline::after(Some(timeout));
    let mut bytes = [0; VmmHello::SIZE];
    recv_exact(&stream, &mut bytes[..4], deadline)?;
    let (size, _) = u32::read_from_prefix(&bytes).map_err(|_| Error::Closed)?;
    let wrong_size = || Error::Protocol(ProtocolError::HandshakeSize(size));

    let kept = VmmHello::kept_len(size).ok_or_else(wrong_size)?;
    let hello = bytes.get_mut(..kept).ok_or_else(wrong_size)?;
    recv_exact(&stream, &mut hello[4..], deadline)?;
    let surplus = usize::try_from(size)
        .unwrap_or_default()
        .saturating_sub(kept);
    recv_exact(&stream, &mut vec![0; surplus], deadline)?;

    let hash = cookie.map(Cookie::hash).unwrap_or_default();
    send_all(&stream, ToolHello::new(hash).as_bytes(), deadline)?;
    Ok(VmmHello::from_prefix(&bytes[..kept]))
}
