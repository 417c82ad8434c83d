// SPDX-License-Identifier: GPL-2.0

//! Open files of the device, and what was mapped through each of them.

use kernel::{
    current,
    mm::virt::VmaNew,
    new_mutex,
    page::Page,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    }, //
};
use kvmi_abi::mem_range::PageRange;

use crate::{
    area::Area,
    claim::Claim,
    counters::{
        self,
        Counted, //
    },
    guest_page::{
        GuestPage,
        Held, //
    },
    mm::{
        self,
        Backing,
        MemlockCharge,
        PinnedPage, //
    },
    page_map::{
        self,
        PageMap,
        PageMaps, //
    },
    proc_map::ProcRef,
    secret::TokenRef, //
};

/// An open file. It belongs to the process that has opened it, whoever else may get hold of it.
#[pin_data]
pub(crate) struct FileMap {
    /// Anonymous pages that were replaced through this file, by address.
    #[pin]
    anonymous: PageMaps,
    /// Mappings of this file. Taken with the lock of the address space held, and never the other
    /// way round: it is held for look-ups and changes only.
    #[pin]
    areas: Mutex<KVec<Arc<Area>>>,
    process: ProcRef,
    _counted: Counted,
}

impl FileMap {
    /// A file that the current process opens.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let process = ProcRef::of_current()?;
        Arc::pin_init(
            pin_init!(Self {
                anonymous <- PageMaps::new(),
                areas <- new_mutex!(KVec::new(), "FileMap::areas"),
                process,
                _counted: Counted::one(&counters::FILES),
            }),
            GFP_KERNEL,
        )
    }

    /// Fails with `EINVAL` unless the current process is the one that has opened the file; another
    /// one has no such addresses.
    pub(crate) fn expect_owner(&self) -> Result {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        self.process.is(mm).then_some(()).ok_or(EINVAL)
    }

    /// Makes the mapping `vma` one of pages that can be replaced.
    pub(crate) fn add_area(self: &Arc<Self>, vma: &VmaNew) -> Result {
        let area = Area::new(self.process.mm(), vma)?;
        self.areas.lock().push(area.clone(), GFP_KERNEL)?;
        let entry = AreaEntry {
            area,
            file: self.clone(),
        };
        mm::back(vma, Arc::new(entry, GFP_KERNEL)?)
    }

    /// The mapping of which `range` is a part.
    fn area(&self, range: &PageRange) -> Option<Arc<Area>> {
        let areas = self.areas.lock();
        // The last one: an older one at the same place is about to be removed.
        areas
            .iter()
            .rev()
            .find(|area| area.contains(range))
            .cloned()
    }

    /// Replaces the page `range` by that at `target` of the VM that the token is for.
    pub(crate) fn map(&self, range: &PageRange, token: TokenRef<'_>, target: u64) -> Result {
        match self.area(range) {
            Some(area) => area.map(range, token, &[target]),
            None => self.map_anonymous(range.start(), token, target),
        }
    }

    /// Replaces the pages of `range`, which are those of one mapping, all or none.
    pub(crate) fn map_many(
        &self,
        range: &PageRange,
        token: TokenRef<'_>,
        targets: &[u64],
    ) -> Result {
        let area = self.area(range).ok_or(EINVAL)?;
        area.map(range, token, targets)
    }

    /// Undoes [`Self::map`]; fails with `ENOENT` if it was not done through this file.
    pub(crate) fn unmap(&self, range: &PageRange) -> Result {
        let of_area = self.area(range).map_or(Ok(0), |area| area.unmap(range))?;
        if of_area != 0 {
            return Ok(());
        }
        // Or one that was there before the mapping was made.
        let address = range.start();
        match page_map::unmap_all(self.anonymous.take(address, address))? {
            0 => Err(ENOENT),
            _ => Ok(()),
        }
    }

    /// Has those pages of `range`, which are of one mapping, be the process' own again; returns how
    /// many were not.
    pub(crate) fn unmap_many(&self, range: &PageRange) -> Result<usize> {
        self.area(range).ok_or(EINVAL)?.unmap(range)
    }

    /// Replaces the anonymous page at `address`.
    fn map_anonymous(&self, address: u64, token: TokenRef<'_>, target: u64) -> Result {
        let claim = Claim::new(self.process.anonymous(), address)?;
        let room = page_map::room()?;
        let charge = MemlockCharge::new(self.process.mm(), 1)?;
        let pinned = PinnedPage::anonymous(usize::try_from(address)?)?;
        let mut map = PageMap {
            page: GuestPage::new(Held::Pinned(pinned)),
            _charge: Some(charge),
            _claim: claim,
        };
        map.page.map(token, target)?;
        self.anonymous.insert(address, room, map);
        Ok(())
    }

    /// The file is closed. Its mappings live on until they are unmapped.
    pub(crate) fn close(&self) {
        // Nobody is to be told of a failure: the pages concerned are quarantined.
        let _ = page_map::unmap_all(self.anonymous.take(0, u64::MAX));
    }
}

/// A mapping's entry in its file's list. The mapping has it, and drops it when it ends.
struct AreaEntry {
    area: Arc<Area>,
    file: Arc<FileMap>,
}

impl Backing for AreaEntry {
    fn page(&self, index: usize) -> Option<&Page> {
        self.area.page(index)
    }
}

impl Drop for AreaEntry {
    fn drop(&mut self) {
        let mut areas = self.file.areas.lock();
        let at = areas.iter().position(|area| Arc::ptr_eq(area, &self.area));
        let removed = at.and_then(|at| areas.remove(at).ok());
        drop(areas);
        // The last reference calls the host: not under the lock.
        drop(removed);
    }
}
