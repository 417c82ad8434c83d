// SPDX-License-Identifier: GPL-2.0

//! Pages of this VM that may be another VM's for a while.

use kernel::{
    pr_warn_once,
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

use crate::{
    counters::{
        self,
        Counted, //
    },
    errno,
    host,
    mm::{
        PageRef,
        PinnedPage, //
    },
    secret::TokenRef, //
};

/// How often the host is asked to unmap a page if it says that it cannot just now.
const UNMAP_ATTEMPTS: usize = 10;

/// How long to wait before the host is asked again.
const UNMAP_PAUSE: Delta = Delta::from_millis(1);

/// What keeps a page from the allocator.
pub(crate) enum Held {
    /// A page of a mapping of the device.
    Provided(PageRef),
    /// A page that a process had itself.
    Pinned(PinnedPage),
}

impl Held {
    fn gpa(&self) -> u64 {
        match self {
            Self::Provided(page) => host::gpa(&page.page()),
            Self::Pinned(page) => host::gpa(&page.page()),
        }
    }
}

/// A page that is given up only when it is this VM's own: dropping it unmaps it on the host, and
/// if the host refuses, the page is quarantined: held for ever.
///
/// This keeps hold of the page itself. How to get to it may change meanwhile (the process may
/// have unmapped or replaced what it had there), and is never asked again.
pub(crate) struct GuestPage {
    /// `None` once it is quarantined.
    held: Option<Held>,
    gpa: u64,
    /// As long as the host has, or may have, replaced it.
    foreign: Option<Counted>,
}

impl GuestPage {
    /// A page that is this VM's own.
    pub(crate) fn new(held: Held) -> Self {
        Self {
            gpa: held.gpa(),
            held: Some(held),
            foreign: None,
        }
    }

    /// Its guest physical address.
    pub(crate) fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Whether it is another VM's.
    pub(crate) fn is_foreign(&self) -> bool {
        self.foreign.is_some()
    }

    /// Notes that the host has replaced it.
    pub(crate) fn set_foreign(&mut self) {
        self.foreign = Some(Counted::one(&counters::MAPPED));
    }

    /// Notes that the host says that it is this VM's own again.
    pub(crate) fn set_own(&mut self) {
        self.foreign = None;
    }

    /// Has the host replace it by the page at `target_gpa` of the VM that the token is for.
    pub(crate) fn map(&mut self, token: TokenRef<'_>, target_gpa: u64) -> Result {
        host::map(token, target_gpa, self.gpa).map_err(errno::of_hypercall)?;
        self.set_foreign();
        Ok(())
    }

    /// Has the host make it this VM's own again, if it is not. If this fails the page is
    /// quarantined. May sleep.
    pub(crate) fn unmap(&mut self) -> Result {
        if !self.is_foreign() {
            return Ok(());
        }
        for attempt in 1.. {
            match host::unmap(self.gpa) {
                Ok(()) => break,
                Err(error) if error.says_unmapped() => break,
                Err(error) if error.is_temporary() && attempt < UNMAP_ATTEMPTS => {
                    fsleep(UNMAP_PAUSE);
                }
                Err(error) => {
                    self.quarantine();
                    return Err(errno::of_hypercall(error));
                }
            }
        }
        self.set_own();
        Ok(())
    }

    /// Never gives the page back: it is, or may be, the memory of another VM.
    fn quarantine(&mut self) {
        match self.held.take() {
            Some(Held::Provided(page)) => page.leak(),
            Some(Held::Pinned(page)) => page.leak(),
            None => {}
        }
        self.foreign = None;
        counters::QUARANTINED.add_one();
        pr_warn_once!("The host did not unmap a page; it is not used any more.\n");
    }
}

impl Drop for GuestPage {
    fn drop(&mut self) {
        // The page is quarantined if this fails; there is nobody to be told.
        let _ = self.unmap();
    }
}
