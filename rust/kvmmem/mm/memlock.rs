// SPDX-License-Identifier: GPL-2.0

//! Pages that cannot be swapped out, charged to a process.

use kernel::{
    bindings,
    mm::Mm,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        }, //
    }, //
};

/// So many pages in `mm_struct::pinned_vm`, as long as this exists. It outlives the process.
pub(crate) struct MemlockCharge {
    mm: ARef<Mm>,
    pages: i64,
}

impl MemlockCharge {
    /// Charges `pages` to `mm`. Fails with `ENOMEM` if that is more than the current process may
    /// lock (`RLIMIT_MEMLOCK`, unless it has `CAP_IPC_LOCK`).
    pub(crate) fn new(mm: &Mm, pages: usize) -> Result<Self> {
        let pages = i64::try_from(pages)?;
        let before = pinned_vm(mm).fetch_add(pages, Relaxed);
        // From here on an error undoes it.
        let charge = Self {
            mm: ARef::from(mm),
            pages,
        };
        // SAFETY: This may be called by any task.
        let limit = unsafe { kvmmem_bindings::kvmmem_memlock_limit() } / PAGE_SIZE;
        let total = before.saturating_add(pages);
        if usize::try_from(total).is_ok_and(|total| total > limit) && !may_lock_more() {
            return Err(ENOMEM);
        }
        Ok(charge)
    }
}

impl Drop for MemlockCharge {
    fn drop(&mut self) {
        pinned_vm(&self.mm).fetch_sub(self.pages, Relaxed);
    }
}

/// The number of pages that a process has pinned.
fn pinned_vm(mm: &Mm) -> &Atomic<i64> {
    // SAFETY: `mm` is valid as long as the reference.
    let counter = unsafe { &raw mut (*mm.as_raw()).__bindgen_anon_1.pinned_vm.counter };
    // SAFETY: The counter is as valid as `mm`, and everybody else accesses it atomically too.
    unsafe { Atomic::from_ptr(counter) }
}

/// Whether the limit does not hold for the current process.
fn may_lock_more() -> bool {
    // CAST: It is 14.
    let capability = bindings::CAP_IPC_LOCK as kernel::ffi::c_int;
    // SAFETY: This may be called by any task.
    unsafe { bindings::capable(capability) }
}
