// SPDX-License-Identifier: GPL-2.0

//! The guest side of memory mapping: programs of this VM map pages of another VM.
//!
//! ```text
//!   program -- /dev/kvmmem --- FileMap --+-- Area (mmap() of the device) -- PageMap ...
//!                                 |      '-- PageMap of anonymous pages
//!                              ProcMap                |
//!                                                  GuestPage -- host -- hypercalls
//! ```
//!
//! * [`device`] is `/dev/kvmmem`: who calls, and what for.
//! * [`proc_map`] is a process that uses it, [`file_map`] an open file, [`area`] a mapping of the
//!   device, [`page_map`] a page that the host has replaced.
//! * [`guest_page`] sees to it that no page that is another VM's goes back to the allocator.
//! * [`host`] is the only part that talks to the host, [`mm`] the only one that talks to the
//!   kernel's memory management.

mod area;
mod claim;
mod counters;
mod device;
mod errno;
mod file_map;
mod guest_page;
mod host;
mod mm;
mod page_map;
mod proc_map;
mod secret;

use kernel::{
    debugfs,
    miscdevice::MiscDeviceOptions,
    prelude::*, //
};
use kvmi_common::miscdev::OwnedMiscDevice;

use crate::{
    file_map::FileMap,
    proc_map::ProcMaps, //
};

module! {
    type: KvmMem,
    name: "kvmmem",
    authors: ["The KVMI maintainers"],
    description: "Maps memory of other VMs into programs of this one",
    license: "GPL",
}

/// The loaded module. Fields are dropped in the order of their declaration: first nobody can open
/// the device any more. No file is open by then, nor is there a mapping of the device: either
/// keeps the module loaded.
#[pin_data]
struct KvmMem {
    #[pin]
    _device: OwnedMiscDevice<FileMap>,
    #[pin]
    _counters: debugfs::File<()>,
    _debugfs: debugfs::Dir,
    _processes: ProcMaps,
}

impl kernel::InPlaceModule for KvmMem {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // SAFETY: A module is initialised once, and nothing looks for a process before there is
            // a device.
            _processes: unsafe { ProcMaps::new() },
            _: { host::expect_kvm()? },
            _debugfs: debugfs::Dir::new(c"kvmmem"),
            _counters <- counters::file(_debugfs),
            _device <- OwnedMiscDevice::register(MiscDeviceOptions { name: c"kvmmem" }, module),
        })
    }
}
