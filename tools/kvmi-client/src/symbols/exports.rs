// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the guest's kernel itself says about its symbols: the table of those that modules may use.

use std::{ops::Range, os::fd::AsFd};

use super::{memory::Memory, table::Table};
use crate::error::Result;

/// A symbol that the guest's kernel exports to modules.
#[derive(Debug)]
pub(super) struct Export {
    /// Its name.
    pub name: String,
    /// Where the guest has it.
    pub address: u64,
}

/// How an entry of the kernel's table of exports looks, by the age of the kernel.
#[derive(Clone, Copy)]
enum Layout {
    /// Distances from where they are, of 32 bits, first to the symbol and then to its name; the
    /// size of an entry.
    Relative(u64),
    /// The addresses themselves.
    Absolute,
}

const LAYOUTS: [Layout; 3] = [
    Layout::Relative(12), // since 5.4
    Layout::Relative(8),  // since 4.19
    Layout::Absolute,
];

/// Compares all that the guest's kernel exports to modules with the file; returns what differs. A
/// kernel without modules exports nothing.
pub(super) fn disagreement<S: AsFd>(
    table: &Table,
    offset: u64,
    memory: &mut Memory<'_, S>,
) -> Result<Option<Export>> {
    let find = |name| table.kernel_symbol(name);
    let (Some(start), Some(end)) = (find("__start___ksymtab"), find("__stop___ksymtab")) else {
        return Ok(None);
    };
    let range = start.wrapping_add(offset)..end.wrapping_add(offset);
    let mut first = None;
    for layout in LAYOUTS {
        match layout.disagreement(table, offset, range.clone(), memory)? {
            None => return Ok(None),
            Some(export) => first = first.or(Some(export)),
        }
    }
    Ok(first)
}

impl Layout {
    fn size(self) -> u64 {
        match self {
            Self::Relative(size) => size,
            Self::Absolute => 16,
        }
    }

    /// Addresses of a symbol and of its name.
    fn decode(self, at: u64, entry: &[u8]) -> Option<(u64, u64)> {
        match self {
            Self::Relative(_) => {
                let (value, rest) = entry.split_first_chunk()?;
                let (name, _) = rest.split_first_chunk()?;
                let value = at.wrapping_add_signed(i32::from_le_bytes(*value).into());
                let name = i32::from_le_bytes(*name).into();
                Some((value, at.wrapping_add(4).wrapping_add_signed(name)))
            }
            Self::Absolute => {
                let (value, rest) = entry.split_first_chunk()?;
                let (name, _) = rest.split_first_chunk()?;
                Some((u64::from_le_bytes(*value), u64::from_le_bytes(*name)))
            }
        }
    }

    fn disagreement<S: AsFd>(
        self,
        table: &Table,
        offset: u64,
        range: Range<u64>,
        memory: &mut Memory<'_, S>,
    ) -> Result<Option<Export>> {
        let unknown = |address| {
            let name = "an export without a name in the file".to_owned();
            Ok(Some(Export { name, address }))
        };
        let size = self.size();
        let (mut at, mut known, mut others) = (range.start, 0_u64, 0_u64);
        while at < range.end {
            let entry = memory.bytes(at, usize::try_from(size).unwrap_or(0))?;
            let Some((address, name)) = entry.and_then(|entry| self.decode(at, &entry)) else {
                return unknown(at);
            };
            let Some(name) = memory.name(name)? else {
                return unknown(address);
            };
            match table.has(&name, address.wrapping_sub(offset)) {
                Some(true) => known += 1,
                Some(false) => return Ok(Some(Export { name, address })),
                // Whoever made the file may have left out some.
                None => others += 1,
            }
            at = at.saturating_add(size);
        }
        if at != range.end || others > known / 8 {
            return unknown(range.start);
        }
        Ok(None)
    }
}
