// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Memory that the tests map, look at, and have replaced.

use std::{
    os::fd::AsFd,
    ptr::{self, NonNull},
};

use rustix::mm::{mmap, mmap_anonymous, munmap, MapFlags, ProtFlags};

use crate::sys::Errno;

/// Size of a page.
pub const PAGE: usize = 4096;

/// Readable and writable.
pub const RW: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// A mapping of whole pages, unmapped when dropped. What is in it may change at any time.
pub struct Memory {
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: all accesses are volatile, and any thread may make them.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `pages` pages of `file`.
    pub fn of_file(
        file: impl AsFd,
        pages: usize,
        prot: ProtFlags,
        flags: MapFlags,
        offset: u64,
    ) -> Result<Self, Errno> {
        // SAFETY: the kernel chooses where.
        let start = unsafe { mmap(ptr::null_mut(), pages * PAGE, prot, flags, file, offset) }?;
        Ok(Self::new(start.cast(), pages))
    }

    /// Maps `pages` pages of the device, readable and writable.
    #[track_caller]
    pub fn of_device(device: impl AsFd, pages: usize) -> Self {
        Self::of_file(device, pages, RW, MapFlags::SHARED, 0).expect("the device can be mapped")
    }

    /// Maps anonymous memory.
    #[track_caller]
    pub fn anonymous(pages: usize, prot: ProtFlags, flags: MapFlags) -> Self {
        // SAFETY: the kernel chooses where.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), pages * PAGE, prot, flags) };
        Self::new(start.expect("memory can be mapped").cast(), pages)
    }

    fn new(start: *mut u8, pages: usize) -> Self {
        Self {
            start: NonNull::new(start).expect("nothing is mapped at 0"),
            pages,
        }
    }

    /// Where a page is.
    #[track_caller]
    pub fn address(&self, page: usize) -> usize {
        self.at(page).addr()
    }

    /// Pointer to a page.
    #[track_caller]
    pub fn at(&self, page: usize) -> *mut u8 {
        assert!(page < self.pages, "the page is in the memory");
        self.start.as_ptr().wrapping_add(page * PAGE)
    }

    /// The first 8 bytes of a page.
    #[track_caller]
    pub fn read(&self, page: usize) -> u64 {
        // SAFETY: the page is mapped, or this is about what happens if it is not.
        unsafe { self.at(page).cast::<u64>().read_volatile() }
    }

    /// Changes the first 8 bytes of a page.
    #[track_caller]
    pub fn write(&self, page: usize, value: u64) {
        // SAFETY: as for `read`.
        unsafe { self.at(page).cast::<u64>().write_volatile(value) }
    }

    /// Whether all of a page is 0.
    #[track_caller]
    pub fn is_zero(&self, page: usize) -> bool {
        (0..PAGE / 8).all(|word| {
            // SAFETY: as for `read`.
            let value = unsafe { self.at(page).cast::<u64>().add(word).read_volatile() };
            value == 0
        })
    }

    /// Whether anything is mapped at the page.
    #[track_caller]
    pub fn is_mapped(&self, page: usize) -> bool {
        let mut state = 0_u8;
        // SAFETY: there is room for the state of one page.
        unsafe { libc::mincore(self.at(page).cast(), PAGE, &raw mut state) == 0 }
    }

    /// Unmaps it all.
    pub fn unmap(self) -> Result<(), Errno> {
        let Self { start, pages } = self;
        std::mem::forget(self);
        // SAFETY: nobody has a reference into it.
        unsafe { munmap(start.as_ptr().cast(), pages * PAGE) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // It may be gone already, and nobody has a reference into it.
        //
        // SAFETY: as above.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.pages * PAGE) };
    }
}
