// SPDX-License-Identifier: GPL-2.0

//! Processes that have the device open.

use core::{
    ops::Deref,
    ptr, //
};
use kernel::{
    current,
    mm::Mm,
    prelude::*,
    sync::{
        aref::ARef,
        Arc, //
    }, //
};

use crate::{
    claim::Claims,
    counters::{
        self,
        Counted, //
    }, //
};

kernel::sync::global_lock! {
    // SAFETY: `ProcMaps::new()` is called before anything else of this file.
    unsafe(uninit) static PROCESSES: Mutex<KVec<Entry>> = KVec::new();
}

/// A process, and how many open files refer to it.
struct Entry {
    process: Arc<ProcMap>,
    files: usize,
}

/// What makes the table usable, for as long as it exists. Statics are not dropped when a module
/// goes: this frees the memory of the table.
pub(crate) struct ProcMaps;

impl ProcMaps {
    /// # Safety
    ///
    /// To be called once, before anything else of this file.
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: By the safety requirements of this function.
        unsafe { PROCESSES.init() };
        Self
    }
}

impl Drop for ProcMaps {
    fn drop(&mut self) {
        *PROCESSES.lock() = KVec::new();
    }
}

/// A process that has the device open: an address space.
///
/// This does not keep the memory of the process, only the identity of its address space: as long as
/// it exists, no other process has one at the same place.
pub(crate) struct ProcMap {
    mm: ARef<Mm>,
    /// Addresses of anonymous pages.
    anonymous: Arc<Claims>,
    _counted: Counted,
}

impl ProcMap {
    /// Whether `mm` is the address space of this process.
    pub(crate) fn is(&self, mm: &Mm) -> bool {
        ptr::eq(self.mm.as_raw(), mm.as_raw())
    }

    /// Whose address space it is.
    pub(crate) fn mm(&self) -> &Mm {
        &self.mm
    }

    /// Who has which anonymous page, by address; for all files of the process.
    pub(crate) fn anonymous(&self) -> &Arc<Claims> {
        &self.anonymous
    }
}

/// An open file's reference to its process. All files that a process has opened share one record.
pub(crate) struct ProcRef(Arc<ProcMap>);

impl ProcRef {
    /// The current process; fails with `ENOENT` if it has no address space.
    pub(crate) fn of_current() -> Result<Self> {
        let task = current!();
        let mm: &Mm = task.mm().ok_or(ENOENT)?;
        let mut table = PROCESSES.lock();
        if let Some(entry) = table.iter_mut().find(|entry| entry.process.is(mm)) {
            entry.files += 1;
            return Ok(Self(entry.process.clone()));
        }
        let process = Arc::new(
            ProcMap {
                mm: ARef::from(mm),
                anonymous: Claims::new()?,
                _counted: Counted::one(&counters::PROCESSES),
            },
            GFP_KERNEL,
        )?;
        let entry = Entry {
            process: process.clone(),
            files: 1,
        };
        table.push(entry, GFP_KERNEL)?;
        Ok(Self(process))
    }
}

impl Deref for ProcRef {
    type Target = ProcMap;

    fn deref(&self) -> &ProcMap {
        &self.0
    }
}

impl Drop for ProcRef {
    fn drop(&mut self) {
        let mut table = PROCESSES.lock();
        let Some(at) = table
            .iter()
            .position(|entry| Arc::ptr_eq(&entry.process, &self.0))
        else {
            return;
        };
        let Some(entry) = table.get_mut(at) else {
            return;
        };
        entry.files -= 1;
        // Out of the table before the address space is let go, which may sleep.
        let removed = (entry.files == 0).then(|| table.remove(at));
        drop(table);
        drop(removed);
    }
}
