// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Going through memory that is mapped for that.

use std::{ops::ControlFlow, os::fd::AsFd};

use super::{
    error::{MapError, Result},
    tokens::Tokens,
    Window, BATCH,
};
use crate::{
    connection::Connection,
    memory::{pages, Bytes, Piece, PAGE_SIZE},
};

impl Window {
    /// As [`Connection::scan_physical`], by mapping the memory: for each 256 pages, or as many as
    /// are free in a row in the window, only two commands are given.
    ///
    /// Where not all of these pages can be mapped, what the VM has is read by commands.
    pub fn scan<S: AsFd, B>(
        &self,
        vm: &mut Connection<S>,
        gpa: u64,
        len: u64,
        mut take: impl FnMut(Piece, Bytes<'_>) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B>> {
        let size = match self.slots().longest_free().min(BATCH) {
            0 => return Err(MapError::Full(1)),
            pages => pages as u64 * PAGE_SIZE,
        };
        let mut tokens = Tokens::read_only();
        let mut copy = Vec::new();
        for (gpa, len) in chunks(gpa, len, size)? {
            let outcome = match self.copy(vm, &mut tokens, gpa, len, &mut copy) {
                Ok(()) => give(gpa, &copy, &mut take)?,
                // Or another thread has taken the pages of the window.
                Err(MapError::Absent(_) | MapError::Full(_)) => {
                    vm.scan_physical(gpa, len as u64, &mut take)?
                }
                Err(error) => return Err(error),
            };
            if outcome.is_break() {
                return Ok(outcome);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Replaces what is in `copy` by the `len` bytes at `gpa`.
    fn copy<S: AsFd>(
        &self,
        vm: &mut Connection<S>,
        tokens: &mut Tokens,
        gpa: u64,
        len: usize,
        copy: &mut Vec<u8>,
    ) -> Result<()> {
        copy.resize(len, 0);
        let mapping = self.map_with(vm, tokens, gpa, len)?;
        mapping.read(gpa, copy)?;
        // If that has ended by now, these may have been zeros of our own.
        vm.get_version()?;
        mapping.unmap()
    }
}

/// Splits `len` bytes at `gpa` at multiples of `size`, in order.
fn chunks(gpa: u64, len: u64, size: u64) -> Result<impl Iterator<Item = (u64, usize)>> {
    if len != 0 {
        gpa.checked_add(len - 1).ok_or(MapError::Range)?;
    }
    let (mut next, mut left) = (gpa, len);
    Ok(std::iter::from_fn(move || {
        let now = left.min(size - next % size);
        let chunk = (next, usize::try_from(now).ok()?);
        left -= now;
        next = next.wrapping_add(now);
        (now != 0).then_some(chunk)
    }))
}

/// Gives `bytes` at `gpa` to `take`, page by page.
fn give<B>(
    gpa: u64,
    bytes: &[u8],
    take: &mut impl FnMut(Piece, Bytes<'_>) -> ControlFlow<B>,
) -> Result<ControlFlow<B>> {
    let mut left = bytes;
    for piece in pages(gpa, bytes.len() as u64)? {
        let (now, later) = left.split_at(piece.len);
        let outcome = take(piece, Ok(now));
        if outcome.is_break() {
            return Ok(outcome);
        }
        left = later;
    }
    Ok(ControlFlow::Continue(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(gpa: u64, len: u64) -> Vec<(u64, usize)> {
        chunks(gpa, len, 0x2000).unwrap().collect()
    }

    #[test]
    fn memory_is_split_where_windows_begin() {
        assert_eq!(split(5, 0), []);
        assert_eq!(split(0x1000, 0x1000), [(0x1000, 0x1000)]);
        assert_eq!(
            split(0x1fff, 0x2002),
            [(0x1fff, 1), (0x2000, 0x2000), (0x4000, 1)]
        );
        assert_eq!(split(u64::MAX, 1), [(u64::MAX, 1)]);
        assert!(matches!(chunks(u64::MAX, 2, 0x2000), Err(MapError::Range)));
    }

    #[test]
    fn pages_are_given_in_order_until_it_is_enough() {
        let mut seen = Vec::new();
        let bytes: Vec<u8> = (0..0x1002u32).map(|at| at as u8).collect();
        let outcome = give(0xfff, &bytes, &mut |piece, bytes| {
            seen.push((piece.gpa, bytes.unwrap().to_vec()));
            if seen.len() == 2 {
                return ControlFlow::Break(7);
            }
            ControlFlow::Continue(())
        });
        assert_eq!(outcome.unwrap(), ControlFlow::Break(7));
        assert_eq!(seen[0], (0xfff, bytes[..1].to_vec()));
        assert_eq!(seen[1], (0x1000, bytes[1..0x1001].to_vec()));
    }
}
