// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Going through guest memory.

use std::{ops::ControlFlow, os::fd::AsFd};

use anyhow::{Context as _, Result};
use kvmi_client::{
    mapped::{MapError, Window},
    Bytes, Command, Connection, Error, KvmiError, Piece,
};

use crate::{cli::Source, output::gpa, session::Session};

/// Pages of a window: as many as one token is good for.
const WINDOW: usize = 256;

/// By what way guest memory is reached.
#[derive(Debug)]
pub enum Via {
    /// The host copies it.
    Commands,
    /// It is mapped, in the VM that this runs in.
    Mapping(Window),
}

/// Opens the way that is asked for, and then the VM: what is missing here is told before anybody
/// waits there.
pub fn open(source: &Source) -> Result<(Via, Session)> {
    let via = match source.map {
        true => Via::Mapping(Window::open(WINDOW).context("cannot map guest memory")?),
        false => Via::Commands,
    };
    Ok((via, Session::open(&source.vm)?))
}

/// What a look at a page, or a part of one, has shown.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    /// Address of the first byte.
    pub gpa: u64,
    /// Number of bytes.
    pub len: u64,
    /// The bytes; none where the guest has no memory.
    pub bytes: Option<&'a [u8]>,
}

/// Reads `len` bytes at `start` page by page, and gives each page to `take`, until that returns
/// `false`.
pub fn scan<S: AsFd>(
    vm: &mut Connection<S>,
    via: &Via,
    start: u64,
    len: u64,
    mut take: impl FnMut(Page<'_>) -> Result<bool>,
) -> Result<()> {
    let take = |piece: Piece, bytes: Bytes<'_>| {
        let bytes = match bytes {
            Ok(bytes) => Some(bytes),
            Err(KvmiError::NoEnt) => None,
            Err(error) => {
                let error = Error::Kvmi(error, Command::VmReadPhysical);
                let what = format!("cannot read guest memory at {}", gpa(piece.gpa));
                return ControlFlow::Break(Err(error).context(what));
            }
        };
        let page = Page {
            gpa: piece.gpa,
            len: piece.len as u64,
            bytes,
        };
        match take(page) {
            Ok(true) => ControlFlow::Continue(()),
            Ok(false) => ControlFlow::Break(Ok(())),
            Err(error) => ControlFlow::Break(Err(error)),
        }
    };
    let outcome = match via {
        Via::Commands => vm.scan_physical(start, len, take).map_err(MapError::from),
        Via::Mapping(window) => window.scan(vm, start, len, take),
    };
    match outcome.context("cannot read guest memory")? {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(outcome) => outcome,
    }
}

/// Writes `bytes` at `start`, all in one page.
pub fn write<S: AsFd>(vm: &mut Connection<S>, via: &Via, start: u64, bytes: &[u8]) -> Result<()> {
    let Via::Mapping(window) = via else {
        return Ok(vm.write_physical(start, bytes)?);
    };
    let mapping = window.map_writable(vm, start, bytes.len())?;
    mapping.write(start, bytes)?;
    // If that has ended by now, they may have gone to a page of our own.
    vm.get_version()?;
    Ok(mapping.unmap()?)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::{
        io::{Read as _, Write as _},
        os::{fd::OwnedFd, unix::net::UnixStream},
        thread,
    };

    use kvmi_client::abi::{
        command::GuestRange,
        event::VcpuEvent,
        wire::{zero_extended, Header, ReplyHead},
    };

    /// A VM that sends what `host` makes of each message.
    pub fn with_script<R>(
        mut host: impl FnMut(&Header, &[u8]) -> Vec<u8> + Send,
        test: impl FnOnce(&mut Connection<OwnedFd>) -> R,
    ) -> R {
        let (ours, mut hosts) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut header = [0; 8];
                while hosts.read_exact(&mut header).is_ok() {
                    let header: Header = zero_extended(&header);
                    let mut payload = vec![0; header.size.into()];
                    hosts.read_exact(&mut payload).unwrap();
                    hosts.write_all(&host(&header, &payload)).unwrap();
                }
            });
            test(&mut Connection::new(ours.into()))
        })
    }

    /// An event of a vCPU as it is sent.
    pub fn vcpu_event(seq: u32, vcpu: u16, event: u8, data: &[u8]) -> Vec<u8> {
        const COMMON: u16 = size_of::<VcpuEvent>() as u16;
        let size = 8 + COMMON + data.len() as u16;
        let mut bytes = [1u16.to_ne_bytes(), size.to_ne_bytes()].concat();
        bytes.extend(seq.to_ne_bytes());
        bytes.extend([event, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend([COMMON.to_ne_bytes(), vcpu.to_ne_bytes()].concat());
        bytes.resize(8 + 8 + usize::from(COMMON), 0);
        bytes.extend(data);
        bytes
    }

    /// A VM with `memory` at 0x1000 and nothing else, which only knows how to be read.
    pub fn with_vm<R>(memory: &[u8], test: impl FnOnce(&mut Connection<OwnedFd>) -> R) -> R {
        let host = |header: &Header, payload: &[u8]| {
            let range: GuestRange = zero_extended(payload);
            let start = range.gpa.checked_sub(0x1000).map(|start| start as usize);
            let part = start.and_then(|start| memory.get(start..start + usize::from(range.size)));
            match part {
                Some(part) => {
                    let head = ReplyHead::success(header, part.len()).unwrap();
                    [head.as_bytes(), part].concat()
                }
                None => ReplyHead::failure(header, KvmiError::NoEnt)
                    .as_bytes()
                    .to_vec(),
            }
        };
        with_script(host, test)
    }

    #[test]
    fn pages_come_in_order_and_holes_are_told() {
        let mut seen = Vec::new();
        with_vm(&[7; 4096], |vm| {
            scan(vm, &Via::Commands, 0xfff, 0x1002, |page| {
                seen.push((page.gpa, page.len, page.bytes.map(<[u8]>::to_vec)));
                Ok(true)
            })
        })
        .unwrap();
        let memory = Some(vec![7; 4096]);
        let expected = [(0xfff, 1, None), (0x1000, 4096, memory), (0x2000, 1, None)];
        assert_eq!(seen, expected);
    }

    #[test]
    fn scan_ends_when_told() {
        let mut pages = 0;
        with_vm(&[], |vm| {
            scan(vm, &Via::Commands, 0, 1 << 40, |_| {
                pages += 1;
                Ok(pages < 3)
            })
        })
        .unwrap();
        assert_eq!(pages, 3);
    }
}
