// SPDX-License-Identifier: GPL-2.0

//! Records of the pages that the host has replaced.

use kernel::{
    new_mutex,
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNodeReservation, //
    },
    sync::Mutex, //
};

use crate::{
    claim::Claim,
    guest_page::GuestPage,
    host::{
        self,
        Batch, //
    },
    mm::MemlockCharge, //
};

/// One page that the host has replaced. Fields are dropped in the order of their declaration: only
/// when the page is this VM's own again, it may be mapped anew.
pub(crate) struct PageMap {
    pub(crate) page: GuestPage,
    /// For a page that is pinned.
    pub(crate) _charge: Option<MemlockCharge>,
    pub(crate) _claim: Claim,
}

/// Room for a record, so that nothing can fail once the host has replaced the page.
pub(crate) type Room = RBTreeNodeReservation<u64, PageMap>;

/// Returns room for a record.
pub(crate) fn room() -> Result<Room> {
    Room::new(GFP_KERNEL)
}

/// The replaced pages of one owner, by a number that the owner gives them.
#[pin_data]
pub(crate) struct PageMaps {
    #[pin]
    pages: Mutex<RBTree<u64, PageMap>>,
}

/// Pages that nobody else can find any more.
pub(crate) type Taken = RBTree<u64, PageMap>;

impl PageMaps {
    /// There are none.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            pages <- new_mutex!(RBTree::new(), "PageMaps::pages"),
        })
    }

    /// Enters a page, of which the claim sees to it that there is none with its number.
    pub(crate) fn insert(&self, number: u64, room: Room, page: PageMap) {
        let old = self.pages.lock().insert(room.into_node(number, page));
        // If there were one, it would be dropped without the lock.
        drop(old);
    }

    /// Takes those with the numbers from `first` to `last` out.
    pub(crate) fn take(&self, first: u64, last: u64) -> Taken {
        let mut taken = RBTree::new();
        let mut pages = self.pages.lock();
        while let Some(cursor) = pages.cursor_lower_bound_mut(&first) {
            if *cursor.current().0 > last {
                break;
            }
            let (_, node) = cursor.remove_current();
            taken.insert(node);
        }
        taken
    }
}

/// Has the host make all of `pages` this VM's own again, with as few hypercalls as possible.
///
/// Does what it can even if there is no memory. Fails if one page had to be quarantined. The caller
/// holds no lock.
pub(crate) fn unmap_all(mut pages: Taken) -> Result<usize> {
    let mut done = 0;
    let mut result = Ok(());
    let are_many = pages.values().nth(1).is_some();
    if let Some(mut batch) = are_many.then(Batch::new).and_then(Result::ok) {
        while unmap_batch(&mut pages, &mut batch, &mut done, &mut result) {}
    }
    for map in pages.values_mut().filter(|map| map.page.is_foreign()) {
        unmap_one(map, &mut done, &mut result);
    }
    result.map(|()| done)
}

/// Unmaps one page, whatever came before.
fn unmap_one(map: &mut PageMap, done: &mut usize, result: &mut Result) {
    match map.page.unmap() {
        Ok(()) => *done += 1,
        Err(error) if result.is_ok() => *result = Err(error),
        Err(_) => {}
    }
}

/// Unmaps as many pages as one hypercall can; returns whether another one is of any use.
fn unmap_batch(
    pages: &mut Taken,
    batch: &mut Batch<u64>,
    done: &mut usize,
    result: &mut Result,
) -> bool {
    batch.clear();
    let foreign = pages.values().filter(|map| map.page.is_foreign());
    for map in foreign.take(Batch::<u64>::CAPACITY) {
        // There is room for so many.
        let _ = batch.push(map.page.gpa());
    }
    if batch.len() == 0 {
        return false;
    }
    let Ok(unmapped) = host::unmap_many(batch) else {
        // One by one, then.
        return false;
    };
    let mut foreign = pages.values_mut().filter(|map| map.page.is_foreign());
    for map in foreign.by_ref().take(unmapped) {
        map.page.set_own();
        *done += 1;
    }
    // It is at this one that the host has stopped, and that tells why.
    if unmapped < batch.len() {
        if let Some(map) = foreign.next() {
            unmap_one(map, done, result);
        }
    }
    true
}
