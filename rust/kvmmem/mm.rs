// SPDX-License-Identifier: GPL-2.0

//! What the module needs of the kernel's memory management and the `kernel` crate lacks.

mod backing;
mod memlock;
mod page_ref;
mod pin;

pub(crate) use backing::{
    back,
    expect_suitable,
    Backing, //
};
pub(crate) use memlock::MemlockCharge;
pub(crate) use page_ref::PageRef;
pub(crate) use pin::PinnedPage;
