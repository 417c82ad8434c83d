// SPDX-License-Identifier: GPL-2.0

//! Mappings of the device.

use kernel::{
    alloc::flags::GFP_KERNEL_ACCOUNT,
    mm::{
        virt::VmaNew,
        Mm, //
    },
    page::{
        Page,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::Arc, //
};
use kvmi_abi::{
    hypercall::MapEntry,
    mem::MAX_AREA_PAGES,
    mem_range::PageRange, //
};

use crate::{
    claim::{
        Claim,
        Claims, //
    },
    counters::{
        self,
        Counted, //
    },
    errno,
    guest_page::{
        GuestPage,
        Held, //
    },
    host::{
        self,
        Batch, //
    },
    mm::{
        expect_suitable,
        MemlockCharge,
        PageRef, //
    },
    page_map::{
        self,
        PageMap,
        PageMaps,
        Room, //
    },
    secret::TokenRef, //
};

/// The pages of a mapping of the device: they are zeroed at first, and stay where they are.
///
/// It is dropped when the mapping is gone and no ioctl is using it. Fields are dropped in the order
/// of their declaration: first the pages that the host has replaced become this VM's own again, after
/// that they can be freed.
#[pin_data(PinnedDrop)]
pub(crate) struct Area {
    #[pin]
    replaced: PageMaps,
    /// Who has which page, by its index.
    claims: Arc<Claims>,
    pages: KVVec<Page>,
    range: PageRange,
    _charge: MemlockCharge,
    _counted: (Counted, Counted),
}

/// A page that is about to be replaced.
struct Pending {
    number: u64,
    room: Room,
    map: PageMap,
}

impl Area {
    /// The pages for the mapping `vma` of the process `mm`, which is being made. May sleep.
    ///
    /// Fails with `EINVAL` if the mapping is private, executable or not of the device's begin,
    /// `E2BIG` if it is too large, `ENOMEM` if there is no memory, or the process may not lock as
    /// much.
    pub(crate) fn new(mm: &Mm, vma: &VmaNew) -> Result<Arc<Self>> {
        expect_suitable(vma)?;
        let count = (vma.end() - vma.start()) / PAGE_SIZE;
        if count > MAX_AREA_PAGES {
            return Err(E2BIG);
        }
        let range = PageRange::new(vma.start() as u64, u32::try_from(count)?, u32::MAX)
            .map_err(errno::of_range)?;
        let charge = MemlockCharge::new(mm, count)?;
        let mut pages = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            // Not from where the kernel would move them away.
            let page = Page::alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO)?;
            pages.push(page, GFP_KERNEL)?;
        }
        let claims = Claims::new()?;
        Arc::pin_init(
            pin_init!(Self {
                replaced <- PageMaps::new(),
                claims,
                pages,
                range,
                _charge: charge,
                _counted: (
                    Counted::one(&counters::AREAS),
                    Counted::many(&counters::AREA_PAGES, i64::from(range.pages())),
                ),
            }),
            GFP_KERNEL,
        )
    }

    /// The page at `index`.
    pub(crate) fn page(&self, index: usize) -> Option<&Page> {
        self.pages.get(index)
    }

    /// Whether all of `range` is in it.
    pub(crate) fn contains(&self, range: &PageRange) -> bool {
        self.range.index_of(range).is_some()
    }

    /// Has the pages of `range` replaced by those at `targets` of the VM that the token is for, all
    /// or none. There are as many targets as pages.
    pub(crate) fn map(&self, range: &PageRange, token: TokenRef<'_>, targets: &[u64]) -> Result {
        let first = self.range.index_of(range).ok_or(EINVAL)?;
        let mut pending = KVec::with_capacity(targets.len(), GFP_KERNEL)?;
        for (index, _) in (first..).zip(targets) {
            pending.push(self.prepare(index)?, GFP_KERNEL)?;
        }
        match (pending.as_mut_slice(), targets) {
            ([only], [target]) => only.map.page.map(token, *target)?,
            (many, _) => map_many(many, token, targets)?,
        }
        for Pending { number, room, map } in pending {
            self.replaced.insert(number, room, map);
        }
        Ok(())
    }

    /// Does everything for the page at `index` that can fail without the host.
    fn prepare(&self, index: u32) -> Result<Pending> {
        let number = u64::from(index);
        let page = self.pages.get(usize::try_from(index)?).ok_or(EINVAL)?;
        Ok(Pending {
            number,
            room: page_map::room()?,
            map: PageMap {
                _claim: Claim::new(&self.claims, number)?,
                _charge: None,
                page: GuestPage::new(Held::Provided(PageRef::new(page))),
            },
        })
    }

    /// Has those pages of `range` that are replaced be this VM's own again; returns how many there
    /// were.
    pub(crate) fn unmap(&self, range: &PageRange) -> Result<usize> {
        let first = u64::from(self.range.index_of(range).ok_or(EINVAL)?);
        let last = first + u64::from(range.pages()) - 1;
        page_map::unmap_all(self.replaced.take(first, last))
    }
}

/// Replaces many pages by one hypercall.
fn map_many(pages: &mut [Pending], token: TokenRef<'_>, targets: &[u64]) -> Result {
    let mut batch = Batch::new()?;
    for (pending, &target_gpa) in pages.iter().zip(targets) {
        batch.push(MapEntry {
            target_gpa,
            gpa: pending.map.page.gpa(),
        })?;
    }
    host::map_many(token, &batch).map_err(errno::of_hypercall)?;
    for pending in pages {
        pending.map.page.set_foreign();
    }
    Ok(())
}

#[pinned_drop]
impl PinnedDrop for Area {
    fn drop(self: Pin<&mut Self>) {
        // By few hypercalls, where dropping the records would take one each. Nobody is to be told of
        // a failure: the pages concerned are quarantined.
        let _ = page_map::unmap_all(self.replaced.take(0, u64::MAX));
    }
}
