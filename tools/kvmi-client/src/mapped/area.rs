// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `/dev/kvmmem`: a mapping of it, its ioctls, and accesses to what is mapped.
//!
//! Another VM changes the memory while it is accessed: it is never referred to, only loaded from and
//! stored to, volatile.

use std::{
    fs::{File, OpenOptions},
    ptr::{self, NonNull},
};

use kvmi_abi::{
    mem::{MemMapMany, MemUnmapMany, MEM_MAP_MANY, MEM_UNMAP_MANY},
    token::MapToken,
};
use rustix::{
    io::Errno,
    ioctl::{ioctl, Setter},
    mm::{mmap, munmap, MapFlags, ProtFlags},
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::error::{MapError, Result};
use crate::memory::PAGE_SIZE;

/// Where the module puts its device.
const PATH: &str = "/dev/kvmmem";

const PAGE: usize = PAGE_SIZE as usize;

/// A mapping of the device.
#[derive(Debug)]
pub(super) struct Area {
    file: File,
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: Whichever thread accesses the memory, it does so as it would with that of another process.
unsafe impl Send for Area {}
// SAFETY: As above.
unsafe impl Sync for Area {}

impl Area {
    /// Maps `pages` pages of the device.
    pub(super) fn open(pages: usize) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(PATH);
        Self::of_file(file.map_err(MapError::of_open)?, pages)
    }

    /// Maps `pages` pages of an open file.
    pub(super) fn of_file(file: File, pages: usize) -> Result<Self> {
        let failed = |errno: Errno| MapError::NoWindow {
            pages,
            source: errno.into(),
        };
        let size = pages.checked_mul(PAGE).ok_or(failed(Errno::TOOBIG))?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: The kernel chooses where.
        let start = unsafe { mmap(ptr::null_mut(), size, access, MapFlags::SHARED, &file, 0) };
        let start = start.map_err(failed)?;
        // Nothing is mapped at 0.
        let start = NonNull::new(start.cast()).ok_or(failed(Errno::NOMEM))?;
        Ok(Self { file, start, size })
    }

    /// Has the pages from index `first` on replaced by those at `gpas`, all or none.
    pub(super) fn map(
        &self,
        token: &MapToken,
        first: usize,
        gpas: &[u64],
    ) -> rustix::io::Result<()> {
        let request = MemMapMany {
            token: *token,
            gva: self.address_of(first)?,
            gpas: gpas.as_ptr().addr() as u64,
            count: u32::try_from(gpas.len()).map_err(|_| Errno::TOOBIG)?,
            padding: 0,
        };
        // SAFETY: MAP_MANY reads a `MemMapMany` through its argument, and as many addresses as that
        // says, which are there. It replaces memory of this mapping, to which nobody has a
        // reference.
        unsafe { ioctl(&self.file, Setter::<{ MEM_MAP_MANY }, _>::new(request)) }
    }

    /// Undoes that for `count` pages from index `first` on.
    pub(super) fn unmap(&self, first: usize, count: usize) -> Result<()> {
        let undo = || {
            let request = MemUnmapMany {
                gva: self.address_of(first)?,
                count: u32::try_from(count).map_err(|_| Errno::TOOBIG)?,
                padding: 0,
            };
            // SAFETY: UNMAP_MANY reads a `MemUnmapMany` through its argument. It replaces memory of
            // this mapping, to which nobody has a reference.
            unsafe { ioctl(&self.file, Setter::<{ MEM_UNMAP_MANY }, _>::new(request)) }
        };
        undo().map_err(|errno: Errno| MapError::System {
            what: "unmap memory of the VM",
            source: errno.into(),
        })
    }

    /// Reads what is `at` bytes behind the start.
    pub(super) fn read(&self, at: usize, buffer: &mut [u8]) -> Result<()> {
        let mut from = self.pointer(at, buffer.len())?.cast_const();
        let mut left = buffer;
        while !left.is_empty() {
            let (width, len) = step(from.addr(), left.len());
            let (now, later) = left.split_at_mut(len);
            // SAFETY: Up to the end of the buffer all is in the mapping, and what `step` says is
            // aligned.
            unsafe {
                match width {
                    8 => load::<u64>(from, now),
                    4 => load::<u32>(from, now),
                    2 => load::<u16>(from, now),
                    _ => load::<u8>(from, now),
                }
            }
            left = later;
            from = from.wrapping_add(len);
        }
        Ok(())
    }

    /// Writes what is `at` bytes behind the start.
    pub(super) fn write(&self, at: usize, data: &[u8]) -> Result<()> {
        let mut to = self.pointer(at, data.len())?;
        let mut left = data;
        while !left.is_empty() {
            let (width, len) = step(to.addr(), left.len());
            let (now, later) = left.split_at(len);
            // SAFETY: As for `read`.
            unsafe {
                match width {
                    8 => store::<u64>(to, now),
                    4 => store::<u32>(to, now),
                    2 => store::<u16>(to, now),
                    _ => store::<u8>(to, now),
                }
            }
            left = later;
            to = to.wrapping_add(len);
        }
        Ok(())
    }

    /// Where `len` bytes are, if they are in the mapping.
    fn pointer(&self, at: usize, len: usize) -> Result<*mut u8> {
        let end = at.checked_add(len).filter(|end| *end <= self.size);
        end.ok_or(MapError::Range)?;
        Ok(self.start.as_ptr().wrapping_add(at))
    }

    fn address_of(&self, page: usize) -> rustix::io::Result<u64> {
        let at = page.checked_mul(PAGE).filter(|at| *at < self.size);
        let at = at.ok_or(Errno::INVAL)?;
        Ok(self.start.as_ptr().wrapping_add(at).addr() as u64)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // The module takes back what is mapped; nothing can be done if it could not.
        //
        // SAFETY: Nobody has a reference into it.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.size) };
    }
}

/// The widest accesses that the alignment of `address` and the number of bytes `left` (at least 1)
/// permit, and for how many bytes in a row.
fn step(address: usize, left: usize) -> (usize, usize) {
    let aligned = 1 << address.trailing_zeros().min(3);
    let fitting = 1 << left.ilog2().min(3);
    match usize::min(aligned, fitting) {
        8 => (8, left - left % 8),
        width => (width, width),
    }
}

/// Loads values of type `T` until `to` is full.
///
/// # Safety
///
/// As many bytes can be read at `from`, and it is aligned for `T`.
unsafe fn load<T: IntoBytes + Immutable>(from: *const u8, to: &mut [u8]) {
    for (index, bytes) in to.chunks_exact_mut(size_of::<T>()).enumerate() {
        // SAFETY: By the precondition of this function.
        let value = unsafe { from.cast::<T>().wrapping_add(index).read_volatile() };
        bytes.copy_from_slice(value.as_bytes());
    }
}

/// Stores values of type `T` until all of `from` is stored.
///
/// # Safety
///
/// As many bytes can be written at `to`, and it is aligned for `T`.
unsafe fn store<T: FromBytes>(to: *mut u8, from: &[u8]) {
    for (index, bytes) in from.chunks_exact(size_of::<T>()).enumerate() {
        // It has the size of a `T`.
        if let Ok(value) = T::read_from_bytes(bytes) {
            // SAFETY: By the precondition of this function.
            unsafe { to.cast::<T>().wrapping_add(index).write_volatile(value) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An area of something that can be mapped as the device can.
    fn area(pages: usize) -> Area {
        let file = tempfile::tempfile().unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        Area::of_file(file, pages).unwrap()
    }

    #[test]
    fn accesses_are_as_wide_as_they_can_be() {
        assert_eq!(step(0x1000, 4096), (8, 4096));
        assert_eq!(step(0x1000, 15), (8, 8));
        assert_eq!(step(0x1004, 4096), (4, 4));
        assert_eq!(step(0x1002, 4096), (2, 2));
        assert_eq!(step(0x1001, 4096), (1, 1));
        assert_eq!(step(0x1000, 7), (4, 4));
        assert_eq!(step(0x1000, 1), (1, 1));
        assert_eq!(step(0, 2), (2, 2));
    }

    #[test]
    fn what_is_written_is_read_at_any_alignment_and_across_pages() {
        let area = area(2);
        let data: Vec<u8> = (0..=255).collect();
        for (at, len) in [
            (0, 256),
            (1, 250),
            (PAGE - 3, 8),
            (PAGE - 7, 64),
            (5, 1),
            (6, 2),
        ] {
            area.write(at, &data[..len]).unwrap();
            let mut read = vec![0xee; len];
            area.read(at, &mut read).unwrap();
            assert_eq!(read, data[..len], "{len} bytes at {at}");
        }
        let mut beside = [0; 2];
        area.read(PAGE + 57, &mut beside).unwrap();
        assert_eq!(beside, [0, 0], "nothing else is written");
    }

    #[test]
    fn nothing_beyond_the_end_is_accessed() {
        let area = area(1);
        let mut two = [0; 2];
        assert!(area.read(PAGE - 2, &mut two).is_ok());
        assert!(area.read(PAGE, &mut []).is_ok());
        for at in [PAGE - 1, PAGE, usize::MAX] {
            assert!(matches!(area.read(at, &mut two), Err(MapError::Range)));
            assert!(matches!(area.write(at, &two), Err(MapError::Range)));
        }
        assert!(area.address_of(0).is_ok());
        assert!(area.address_of(1).is_err());
    }

    #[test]
    fn window_has_at_least_a_page() {
        let file = tempfile::tempfile().unwrap();
        let error = Area::of_file(file, 0).unwrap_err();
        assert!(matches!(error, MapError::NoWindow { pages: 0, .. }));
    }
}
