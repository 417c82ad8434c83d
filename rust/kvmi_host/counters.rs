// SPDX-License-Identifier: GPL-2.0

//! Statistics of a session, for `kvmictl stats`.

use kernel::sync::atomic::Atomic;

/// What has happened since the VM was hooked.
pub(crate) struct Counters {
    /// Commands received, replies to events included.
    pub(crate) commands: Atomic<u64>,
    /// Events sent.
    pub(crate) events: Atomic<u64>,
    /// Changes of memory slots.
    pub(crate) memslot_changes: Atomic<u64>,
    /// vCPUs that have served a request.
    pub(crate) vcpus_served: Atomic<u32>,
    /// Time that vCPUs have waited for replies to events, in ns.
    pub(crate) held_ns: Atomic<u64>,
}

impl Counters {
    /// Nothing has happened yet.
    pub(crate) const fn new() -> Self {
        Self {
            commands: Atomic::new(0),
            events: Atomic::new(0),
            memslot_changes: Atomic::new(0),
            vcpus_served: Atomic::new(0),
            held_ns: Atomic::new(0),
        }
    }
}
