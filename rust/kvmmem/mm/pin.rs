// SPDX-License-Identifier: GPL-2.0

//! Anonymous pages of a process, kept where they are.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h);
//! see also [`Documentation/core-api/pin_user_pages.rst`](srctree/Documentation/core-api/pin_user_pages.rst)

use core::{
    mem::ManuallyDrop,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    bindings,
    current,
    mm::{
        virt::{
            flags,
            VmaRef, //
        },
        MmapReadGuard, //
    },
    page::BorrowedPage,
    prelude::*, //
};

use crate::counters::{
    self,
    Counted, //
};

/// A page that a process has alone, and that stays the one at its address: it is neither swapped,
/// moved, merged nor shared with a child.
///
/// # Invariants
///
/// `page` is a valid page of which we own a long-term pin.
pub(crate) struct PinnedPage {
    page: NonNull<bindings::page>,
    counted: Option<Counted>,
}

// SAFETY: A pin may be given up by any task.
unsafe impl Send for PinnedPage {}
// SAFETY: There is nothing that `&self` could change.
unsafe impl Sync for PinnedPage {}

impl PinnedPage {
    /// Pins the page at `address` of the current process; makes it present before. May sleep.
    ///
    /// Fails with `ENOENT` if nothing is mapped there, `EINVAL` if it is no small page of private
    /// anonymous memory, `EACCES` if that may not be written to.
    pub(crate) fn anonymous(address: usize) -> Result<Self> {
        let task = current!();
        let mm = task.mm().ok_or(ENOENT)?;
        let guard = mm.mmap_read_lock();
        expect_anonymous(guard.vma_lookup(address).ok_or(ENOENT)?)?;
        let pinned = Self::pin(&guard, address)?;
        drop(guard);

        // SAFETY: The page is valid by the type invariant.
        if unsafe { kvmmem_bindings::kvmmem_page_is_large(pinned.page.as_ptr()) } {
            // The host replaces small pages only, and who splits it is the process: MADV_NOHUGEPAGE.
            return Err(EINVAL);
        }
        Ok(pinned)
    }

    /// Pins what is at `address` of the current process, of which `_guard` is held.
    fn pin(_guard: &MmapReadGuard<'_>, address: usize) -> Result<Self> {
        let mut page = ptr::null_mut();
        // SAFETY: The caller holds the lock of the current process' address space; there is room for
        // one page.
        let count = unsafe {
            bindings::pin_user_pages(
                address,
                1,
                bindings::FOLL_WRITE | bindings::FOLL_LONGTERM,
                &raw mut page,
            )
        };
        if count < 0 {
            return Err(Error::from_errno(i32::try_from(count)?));
        }
        // INVARIANT: If there is a page now, it is pinned.
        Ok(Self {
            page: NonNull::new(page).ok_or(EFAULT)?,
            counted: Some(Counted::one(&counters::PINNED)),
        })
    }

    /// Keeps the page pinned for ever, and forgets about it.
    pub(crate) fn leak(self) {
        ManuallyDrop::new(self).counted = None;
    }

    /// The page.
    pub(crate) fn page(&self) -> BorrowedPage<'_> {
        // SAFETY: The page is valid by the type invariant as long as `self` exists.
        unsafe { BorrowedPage::from_raw(self.page) }
    }
}

impl Drop for PinnedPage {
    fn drop(&mut self) {
        // SAFETY: We own a pin by the type invariant.
        unsafe { bindings::unpin_user_page(self.page.as_ptr()) };
    }
}

/// Whether the pages of `vma` are a process' own, to be replaced as it likes.
fn expect_anonymous(vma: &VmaRef) -> Result {
    const OTHER: usize =
        flags::SHARED | flags::HUGETLB | flags::IO | flags::PFNMAP | flags::MIXEDMAP;

    // SAFETY: The lock that a `VmaRef` comes with excludes changes.
    let has_ops = !unsafe { (*vma.as_ptr()).vm_ops }.is_null();
    if has_ops || vma.flags() & OTHER != 0 {
        return Err(EINVAL);
    }
    if vma.flags() & flags::WRITE == 0 {
        return Err(EACCES);
    }
    Ok(())
}
