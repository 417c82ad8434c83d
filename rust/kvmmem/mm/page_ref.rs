// SPDX-License-Identifier: GPL-2.0

//! References to pages that have another owner, too.

use core::{
    mem,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    page::{
        BorrowedPage,
        Page, //
    }, //
};

/// A reference to a page: it goes back to the allocator when its owner and all of these are gone.
///
/// # Invariants
///
/// `page` is a valid page of order 0, of which we own a reference.
pub(crate) struct PageRef {
    page: NonNull<bindings::page>,
}

// SAFETY: A reference may be put by any task.
unsafe impl Send for PageRef {}
// SAFETY: There is nothing that `&self` could change.
unsafe impl Sync for PageRef {}

impl PageRef {
    /// One more reference to `page`.
    pub(crate) fn new(page: &Page) -> Self {
        // SAFETY: The page is valid by the type invariant of `Page`.
        unsafe { kvmmem_bindings::kvmmem_page_get(page.as_ptr()) };
        // INVARIANT: This is the reference. A `Page` has order 0.
        Self {
            // SAFETY: It is no null pointer, being that of a `Page`.
            page: unsafe { NonNull::new_unchecked(page.as_ptr()) },
        }
    }

    /// Keeps the page from the allocator for ever, and forgets about it.
    pub(crate) fn leak(self) {
        mem::forget(self);
    }

    /// The page.
    pub(crate) fn page(&self) -> BorrowedPage<'_> {
        // SAFETY: The page is valid by the type invariant as long as `self` exists.
        unsafe { BorrowedPage::from_raw(self.page) }
    }
}

impl Drop for PageRef {
    fn drop(&mut self) {
        // SAFETY: We own a reference to the page, which has order 0, by the type invariant.
        unsafe { bindings::__free_pages(self.page.as_ptr(), 0) };
    }
}
