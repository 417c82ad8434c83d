// SPDX-License-Identifier: GPL-2.0

//! Arguments of hypercalls that are about many pages: an array that fills a page of its own.

use core::marker::PhantomData;
use kernel::{
    page::{
        Page,
        PAGE_SIZE, //
    },
    prelude::*, //
};
use zerocopy::{
    Immutable,
    IntoBytes, //
};

/// A page with an array of `T`, of which the first `len` have a value.
pub(crate) struct Batch<T> {
    page: Page,
    len: usize,
    _p: PhantomData<T>,
}

impl<T: IntoBytes + Immutable> Batch<T> {
    /// Number of entries that fit.
    pub(crate) const CAPACITY: usize = PAGE_SIZE / size_of::<T>();

    /// An empty array. May sleep.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            page: Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?,
            len: 0,
            _p: PhantomData,
        })
    }

    /// Appends an entry; fails with `E2BIG` if there is no room.
    pub(crate) fn push(&mut self, entry: T) -> Result {
        if self.len == Self::CAPACITY {
            return Err(E2BIG);
        }
        let bytes = entry.as_bytes();
        // SAFETY: The source is valid for as many bytes as it has. Nobody else accesses the page:
        // it is ours, and the host reads it during a hypercall only, which takes `&self`.
        unsafe {
            self.page
                .write_raw(bytes.as_ptr(), self.len * size_of::<T>(), bytes.len())?
        };
        self.len += 1;
        Ok(())
    }

    /// Forgets all entries.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Guest physical address of the array.
    pub(super) fn gpa(&self) -> u64 {
        super::gpa(&self.page)
    }
}
