// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Going through guest memory.

use std::{ops::ControlFlow, os::fd::AsFd};

use anyhow::{Context as _, Result};
use kvmi_client::{Command, Connection, Error, KvmiError};

use crate::output::gpa;

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
    start: u64,
    len: u64,
    mut take: impl FnMut(Page<'_>) -> Result<bool>,
) -> Result<()> {
    let outcome = vm.scan_physical(start, len, |piece, bytes| {
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
    });
    match outcome.context("cannot read guest memory")? {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(outcome) => outcome,
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::{
        io::{Read as _, Write as _},
        os::unix::net::UnixStream,
        thread,
    };

    use kvmi_client::abi::{
        command::GuestRange,
        wire::{zero_extended, Header, ReplyHead},
    };

    /// A VM with `memory` at 0x1000 and nothing else, which only knows how to be read.
    pub fn with_vm<R>(memory: &[u8], test: impl FnOnce(&mut Connection<UnixStream>) -> R) -> R {
        let (ours, hosts) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| serve(hosts, memory));
            test(&mut Connection::new(ours))
        })
    }

    fn serve(mut socket: UnixStream, memory: &[u8]) {
        let mut request = [0; 24];
        while socket.read_exact(&mut request).is_ok() {
            let header: Header = zero_extended(&request);
            let range: GuestRange = zero_extended(&request[8..]);
            let start = range.gpa.checked_sub(0x1000).map(|start| start as usize);
            let part = start.and_then(|start| memory.get(start..start + usize::from(range.size)));
            let reply = match part {
                Some(part) => {
                    let head = ReplyHead::success(&header, part.len()).unwrap();
                    [head.as_bytes(), part].concat()
                }
                None => ReplyHead::failure(&header, KvmiError::NoEnt)
                    .as_bytes()
                    .to_vec(),
            };
            socket.write_all(&reply).unwrap();
        }
    }

    #[test]
    fn pages_come_in_order_and_holes_are_told() {
        let mut seen = Vec::new();
        with_vm(&[7; 4096], |vm| {
            scan(vm, 0xfff, 0x1002, |page| {
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
            scan(vm, 0, 1 << 40, |_| {
                pages += 1;
                Ok(pages < 3)
            })
        })
        .unwrap();
        assert_eq!(pages, 3);
    }
}
