// SPDX-License-Identifier: GPL-2.0

//! Who is mapping, or has mapped, a page: exclusion without a lock that is held meanwhile.

use kernel::{
    new_mutex,
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNodeReservation, //
    },
    sync::{
        Arc,
        Mutex, //
    }, //
};

use crate::errno;

/// What can be claimed: each number once.
#[pin_data]
pub(crate) struct Claims {
    #[pin]
    taken: Mutex<RBTree<u64, ()>>,
}

impl Claims {
    /// Nothing is claimed yet.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                taken <- new_mutex!(RBTree::new(), "Claims::taken"),
            }),
            GFP_KERNEL,
        )
    }
}

/// A number that nobody else can claim as long as this exists.
pub(crate) struct Claim {
    claims: Arc<Claims>,
    number: u64,
}

impl Claim {
    /// Claims `number`; fails with `EALREADY` if somebody has done so.
    pub(crate) fn new(claims: &Arc<Claims>, number: u64) -> Result<Self> {
        let node = RBTreeNodeReservation::new(GFP_KERNEL)?;
        let mut taken = claims.taken.lock();
        if taken.get(&number).is_some() {
            return Err(errno::already());
        }
        taken.insert(node.into_node(number, ()));
        drop(taken);
        Ok(Self {
            claims: claims.clone(),
            number,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.taken.lock().remove_node(&self.number);
    }
}
