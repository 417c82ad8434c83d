// SPDX-License-Identifier: GPL-2.0

//! How much there is of what, in `/sys/kernel/debug/kvmmem/counters`.
//!
//! All but the last one are 0 when no program uses the device: that is how leaks are found.

use core::fmt;
use kernel::{
    debugfs::{
        Dir,
        File, //
    },
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// One of the numbers.
pub(crate) struct Counter(Atomic<i64>);

/// Open files of the device.
pub(crate) static FILES: Counter = Counter(Atomic::new(0));
/// Processes with such files.
pub(crate) static PROCESSES: Counter = Counter(Atomic::new(0));
/// Mappings of the device.
pub(crate) static AREAS: Counter = Counter(Atomic::new(0));
/// Their pages.
pub(crate) static AREA_PAGES: Counter = Counter(Atomic::new(0));
/// Anonymous pages that are pinned.
pub(crate) static PINNED: Counter = Counter(Atomic::new(0));
/// Pages that the host has replaced.
pub(crate) static MAPPED: Counter = Counter(Atomic::new(0));
/// Pages that the host refused to give back, ever.
pub(crate) static QUARANTINED: Counter = Counter(Atomic::new(0));

impl Counter {
    /// There is one more.
    pub(crate) fn add_one(&self) {
        self.0.fetch_add(1, Relaxed);
    }
}

/// So many of what a counter counts, as long as this exists.
pub(crate) struct Counted(&'static Counter, i64);

impl Counted {
    /// There is one more.
    pub(crate) fn one(counter: &'static Counter) -> Self {
        Self::many(counter, 1)
    }

    /// There are `count` more.
    pub(crate) fn many(counter: &'static Counter, count: i64) -> Self {
        counter.0.fetch_add(count, Relaxed);
        Self(counter, count)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0 .0.fetch_sub(self.1, Relaxed);
    }
}

/// The file that shows them.
pub(crate) fn file(dir: &Dir) -> impl PinInit<File<()>> + '_ {
    dir.read_callback_file(c"counters", (), &|(), f: &mut fmt::Formatter<'_>| {
        for (name, counter) in [
            ("files", &FILES),
            ("processes", &PROCESSES),
            ("areas", &AREAS),
            ("area_pages", &AREA_PAGES),
            ("pinned", &PINNED),
            ("mapped", &MAPPED),
            ("quarantined", &QUARANTINED),
        ] {
            writeln!(f, "{name} {}", counter.0.load(Relaxed))?;
        }
        Ok(())
    })
}
