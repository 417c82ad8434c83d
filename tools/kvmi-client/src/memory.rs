// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Guest physical memory.

use std::{collections::VecDeque, ops::ControlFlow, os::fd::AsFd};

use kvmi_abi::{
    command::{GuestRange, MAX_MEMORY_ACCESS},
    Command, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    connection::Connection,
    error::{Error, ProtocolError, Result},
};

/// Size of a page of guest memory, in bytes; one command reaches into one page.
pub const PAGE_SIZE: u64 = MAX_MEMORY_ACCESS as u64;

/// A part of a range of guest memory that lies in one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First guest physical address.
    pub gpa: u64,
    /// Number of bytes, at least 1.
    pub len: usize,
}

/// Splits `len` bytes at `gpa` at the borders of pages, in order.
///
/// Fails with [`Error::Range`] if the range does not fit the address space.
pub fn pages(gpa: u64, len: u64) -> Result<impl Iterator<Item = Piece>> {
    let mut left = len;
    let mut next = gpa;
    if left != 0 {
        gpa.checked_add(left - 1).ok_or(Error::Range)?;
    }
    Ok(std::iter::from_fn(move || {
        let piece = left.min(PAGE_SIZE - next % PAGE_SIZE);
        if piece == 0 {
            return None;
        }
        let gpa = next;
        left -= piece;
        next = next.wrapping_add(piece);
        // At most a page, so nothing is lost.
        let len = piece as usize;
        Some(Piece { gpa, len })
    }))
}

impl Piece {
    fn request(&self) -> Result<GuestRange> {
        Ok(GuestRange {
            gpa: self.gpa,
            size: u16::try_from(self.len).map_err(|_| Error::Range)?,
            ..Default::default()
        })
    }

    /// Checks that the host has sent as much as it was asked for.
    fn check(&self, data: &[u8]) -> std::result::Result<(), ProtocolError> {
        if data.len() == self.len {
            return Ok(());
        }
        Err(ProtocolError::Size {
            got: data.len(),
            wanted: self.len,
        })
    }
}

/// Commands that [`Connection::scan_physical`] has under way. Their replies fit into the buffers of
/// a socket, so the host need not wait for a caller that takes its time.
const WINDOW: usize = 16;

/// What the host says about a piece of memory: its bytes, or why there are none.
pub type Bytes<'a> = std::result::Result<&'a [u8], KvmiError>;

impl<S: AsFd> Connection<S> {
    /// Reads guest memory, page by page.
    ///
    /// A page that the guest does not have gives `KVM_ENOENT`; `buffer` then holds what came
    /// before. Use [`Self::scan_physical`] to know which page that was.
    pub fn read_physical(&mut self, gpa: u64, buffer: &mut [u8]) -> Result<()> {
        let mut left = buffer;
        for piece in pages(gpa, left.len() as u64)? {
            let data = self.command(Command::VmReadPhysical, &[piece.request()?.as_bytes()])?;
            let (now, later) = left.split_at_mut(piece.len);
            if let Err(error) = piece.check(&data) {
                return Err(self.violated(error));
            }
            now.copy_from_slice(&data);
            left = later;
        }
        Ok(())
    }

    /// Reads `len` bytes at `gpa` and gives them to `take` page by page, in order, until it breaks
    /// off. Pages that cannot be read are for `take` to judge.
    ///
    /// Several commands are kept under way, which makes this much faster than reading pages one
    /// by one.
    pub fn scan_physical<B>(
        &mut self,
        gpa: u64,
        len: u64,
        mut take: impl FnMut(Piece, Bytes<'_>) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B>> {
        let pieces = pages(gpa, len)?;
        self.exchange(|connection| connection.scan(pieces, &mut take))
    }

    fn scan<B>(
        &mut self,
        mut pieces: impl Iterator<Item = Piece>,
        take: &mut impl FnMut(Piece, Bytes<'_>) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B>> {
        let mut under_way = VecDeque::with_capacity(WINDOW);
        let mut outcome = ControlFlow::Continue(());
        loop {
            // In batches: half of the window at a time, and nothing more after a break.
            if outcome.is_continue() && under_way.len() <= WINDOW / 2 {
                for piece in pieces.by_ref().take(WINDOW - under_way.len()) {
                    let request = piece.request()?;
                    let header = self.queue(Command::VmReadPhysical, &[request.as_bytes()])?;
                    under_way.push_back((header, piece));
                }
                self.flush()?;
            }
            let Some((header, piece)) = under_way.pop_front() else {
                return Ok(outcome);
            };
            let reply = self.reply_to(&header)?;
            if let Ok(data) = &reply {
                piece.check(data)?;
            }
            if outcome.is_continue() {
                outcome = take(piece, reply.as_deref().map_err(|error| *error));
            }
        }
    }

    /// Writes guest memory, page by page; on an error the pages before are written.
    pub fn write_physical(&mut self, gpa: u64, data: &[u8]) -> Result<()> {
        let mut left = data;
        for piece in pages(gpa, left.len() as u64)? {
            let (now, later) = left.split_at(piece.len);
            let range = piece.request()?;
            self.command(Command::VmWritePhysical, &[range.as_bytes(), now])?;
            left = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(gpa: u64, len: u64) -> Vec<(u64, usize)> {
        pages(gpa, len).unwrap().map(|p| (p.gpa, p.len)).collect()
    }

    #[test]
    fn ranges_are_split_at_pages() {
        assert_eq!(split(5, 0), []);
        assert_eq!(split(0x1000, 4096), [(0x1000, 4096)]);
        assert_eq!(split(0x1ffe, 4), [(0x1ffe, 2), (0x2000, 2)]);
        assert_eq!(
            split(0xfff, 4098),
            [(0xfff, 1), (0x1000, 4096), (0x2000, 1)]
        );
    }

    #[test]
    fn last_page_of_the_address_space_can_be_reached_but_not_passed() {
        assert_eq!(split(u64::MAX, 1), [(u64::MAX, 1)]);
        assert_eq!(split(u64::MAX - 4095, 4096), [(u64::MAX - 4095, 4096)]);
        assert!(matches!(pages(u64::MAX, 2), Err(Error::Range)));
        assert!(pages(1, u64::MAX).is_ok());
        assert!(matches!(pages(2, u64::MAX), Err(Error::Range)));
    }

    #[test]
    fn every_piece_is_what_a_command_may_name() {
        for piece in pages(0x123, 0x5432).unwrap() {
            assert!(piece.request().unwrap().is_valid());
        }
    }
}
