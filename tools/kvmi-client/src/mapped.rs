// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Memory of the introspected VM, mapped: for a tool that runs in a VM of its own.
//!
//! The tool's VM has to be an *introspector*, which the administrator of the host makes of it
//! (`kvmictl introspector --on`), and has to have the module `kvmmem` loaded. A [`Window`] is memory
//! of the tool in which pages of other VMs can be had; a [`Mapping`] is some of them:
//!
//! ```no_run
//! use kvmi_client::{mapped::Window, tool, Connection};
//! use std::{os::unix::net::UnixListener, time::Duration};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (stream, _) = UnixListener::bind("/run/tool")?.accept()?;
//! tool::accept(&stream, None, Duration::from_secs(10))?;
//! let mut vm = Connection::new(stream);
//!
//! let window = Window::open(256)?;
//! let memory = window.map(&mut vm, 0x10_0000, 0x2000)?;
//! let value: u64 = memory.read_obj(0x10_0ff8)?;
//! println!("{value:#x}");
//! # Ok(())
//! # }
//! ```
//!
//! No call is needed to see what the VM writes there, nor, with [`Window::map_writable`], for the VM
//! to see what the tool writes. A mapping of a page outlives neither the page nor the introspection
//! of the VM: from then on the tool finds zeros there, or what it has itself written since. Whoever
//! has to know for sure gives a command on the [`Connection`] after reading: if that succeeds, the
//! introspection had not ended.
//!
//! A child of `fork()` does not have the window.

mod area;
mod error;
mod scan;
mod slots;
mod tokens;

use std::{
    ops::Range,
    os::fd::AsFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use kvmi_abi::mem::MAX_MAP_PAGES;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{connection::Connection, memory::PAGE_SIZE};

use area::Area;
pub use error::{MapError, Result};
use slots::Slots;
use tokens::Tokens;

/// Pages that one token is good for.
const BATCH: usize = MAX_MAP_PAGES as usize;

/// Memory of this process whose pages can be replaced by pages of other VMs.
#[derive(Debug)]
pub struct Window {
    area: Area,
    slots: Mutex<Slots>,
}

impl Window {
    /// Makes a window of `pages` pages, 65,536 at most. They count as locked memory of the process.
    pub fn open(pages: usize) -> Result<Self> {
        Ok(Self {
            area: Area::open(pages)?,
            slots: Mutex::new(Slots::new(pages)),
        })
    }

    /// Maps the pages with the `len` bytes at `gpa`, all or none, to be read.
    pub fn map<S: AsFd>(
        &self,
        vm: &mut Connection<S>,
        gpa: u64,
        len: usize,
    ) -> Result<Mapping<'_>> {
        self.map_with(vm, &mut Tokens::read_only(), gpa, len)
    }

    /// As [`Self::map`], to be written, too.
    pub fn map_writable<S: AsFd>(
        &self,
        vm: &mut Connection<S>,
        gpa: u64,
        len: usize,
    ) -> Result<Mapping<'_>> {
        self.map_with(vm, &mut Tokens::writable(), gpa, len)
    }

    fn map_with<S: AsFd>(
        &self,
        vm: &mut Connection<S>,
        tokens: &mut Tokens,
        gpa: u64,
        len: usize,
    ) -> Result<Mapping<'_>> {
        let gpas = pages_of(gpa, len)?;
        let count = gpas.len();
        let first = self.slots().take(count).ok_or(MapError::Full(count))?;
        let mut mapping = Mapping {
            window: self,
            gpa: gpas.first().copied().unwrap_or(gpa),
            first,
            taken: count,
            mapped: 0,
            is_writable: tokens.are_writable(),
        };
        for batch in gpas.chunks(BATCH) {
            let at = first + mapping.mapped;
            tokens.present(vm, |token| self.area.map(token, at, batch), batch)?;
            mapping.mapped += batch.len();
        }
        Ok(mapping)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        // No operation on them ends half-way.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The addresses of the pages that contain `len` bytes at `gpa`.
fn pages_of(gpa: u64, len: usize) -> Result<Vec<u64>> {
    let last = (len as u64)
        .checked_sub(1)
        .and_then(|more| gpa.checked_add(more))
        .ok_or(MapError::Range)?;
    let pages = gpa / PAGE_SIZE..=last / PAGE_SIZE;
    Ok(pages.map(|gfn| gfn * PAGE_SIZE).collect())
}

/// Pages of the introspected VM in a [`Window`]; dropping it unmaps them.
///
/// All accesses are to what the VM has there at this moment. One of 1, 2, 4 or 8 bytes at a multiple
/// of its size is done at once; larger ones are done piece by piece, and the VM may change the
/// memory meanwhile.
#[derive(Debug)]
#[must_use = "the pages are unmapped as soon as this is dropped"]
pub struct Mapping<'w> {
    window: &'w Window,
    /// Address of the first page.
    gpa: u64,
    /// Index of the first page in the window.
    first: usize,
    taken: usize,
    mapped: usize,
    is_writable: bool,
}

impl Mapping<'_> {
    /// The guest physical addresses that can be accessed: those of whole pages.
    pub fn range(&self) -> Range<u64> {
        // They were addresses of pages before.
        self.gpa..self.gpa.saturating_add(self.mapped as u64 * PAGE_SIZE)
    }

    /// Reads memory at a guest physical address.
    pub fn read(&self, gpa: u64, buffer: &mut [u8]) -> Result<()> {
        let at = self.offset(gpa, buffer.len())?;
        self.window.area.read(at, buffer)
    }

    /// Reads a value at a guest physical address.
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, gpa: u64) -> Result<T> {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes memory at a guest physical address.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<()> {
        // The store itself would raise SIGSEGV, or worse, be repeated for ever.
        if !self.is_writable {
            return Err(MapError::ReadOnly);
        }
        let at = self.offset(gpa, data.len())?;
        self.window.area.write(at, data)
    }

    /// Writes a value at a guest physical address.
    pub fn write_obj<T: IntoBytes + Immutable>(&self, gpa: u64, value: &T) -> Result<()> {
        self.write(gpa, value.as_bytes())
    }

    /// Unmaps the pages. Dropping does the same but tells no error.
    pub fn unmap(mut self) -> Result<()> {
        self.undo()
    }

    /// Where an address is in the window, if `len` bytes from there on are mapped.
    fn offset(&self, gpa: u64, len: usize) -> Result<usize> {
        let size = self.mapped as u64 * PAGE_SIZE;
        let offset = gpa.checked_sub(self.gpa).ok_or(MapError::Range)?;
        let end = offset.checked_add(len as u64).ok_or(MapError::Range)?;
        if end > size {
            return Err(MapError::Range);
        }
        let start = self.first as u64 * PAGE_SIZE;
        usize::try_from(start + offset).map_err(|_| MapError::Range)
    }

    fn undo(&mut self) -> Result<()> {
        let (mapped, taken) = (self.mapped, self.taken);
        (self.mapped, self.taken) = (0, 0);
        if mapped != 0 {
            // If that fails, the pages are of no use any more: they stay taken.
            self.window.area.unmap(self.first, mapped)?;
        }
        self.window.slots().give_back(self.first, taken);
        Ok(())
    }
}

impl Drop for Mapping<'_> {
    fn drop(&mut self) {
        let _ = self.undo();
    }
}

#[cfg(test)]
mod tests;
