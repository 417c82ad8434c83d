// SPDX-License-Identifier: GPL-2.0 OR MIT

//! How much memory a process may keep from being swapped out.

use rustix::{
    mm::MapFlags,
    process::{setrlimit, Resource, Rlimit},
    thread::{capabilities, set_capabilities, CapabilitySet},
};

use crate::{
    arguments::{expect_refused, request},
    harness::{test, Options, Test},
    memory::{Memory, PAGE, RW},
    sys::{device, map, Errno},
};

const AREA: &str = "limits";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(mappings_count_as_locked_memory),
    test!(pinned_pages_count_as_locked_memory),
    test!(the_limit_is_not_for_who_may_lock_memory),
];

fn limit(pages: usize) {
    let limit = Some((pages * PAGE) as u64);
    let limits = Rlimit {
        current: limit,
        maximum: limit,
    };
    setrlimit(Resource::Memlock, limits).expect("a limit can be set");
}

fn drop_capability() {
    let mut sets = capabilities(None).expect("capabilities can be read");
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, sets).expect("a capability can be dropped");
}

fn mappings_count_as_locked_memory(options: &Options) {
    let device = device();
    limit(16);
    drop_capability();
    let of_device = |pages| Memory::of_file(&device, pages, RW, MapFlags::SHARED, 0);
    assert_eq!(of_device(17).err(), Some(Errno::NOMEM));
    // Whatever was charged is given back: by a failure, and by the end.
    for _ in 0..options.rounds {
        let all = of_device(16).expect("it is within the limit");
        assert_eq!(of_device(1).err(), Some(Errno::NOMEM));
        all.unmap().expect("it can be unmapped");
        let part = of_device(10).expect("it is within the limit");
        assert_eq!(of_device(7).err(), Some(Errno::NOMEM));
        let rest = of_device(6).expect("it is within the limit");
        drop((part, rest));
    }
    // It is the process that counts, not the file.
    let other = crate::sys::device();
    let _all = of_device(16).expect("it is within the limit");
    let more = Memory::of_file(&other, 1, RW, MapFlags::SHARED, 0);
    assert_eq!(more.err(), Some(Errno::NOMEM));
}

fn pinned_pages_count_as_locked_memory(options: &Options) {
    let device = device();
    limit(2);
    drop_capability();
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    for _ in 0..options.rounds {
        expect_refused(map(&device, &request(0, own.address(0))), options);
    }
    let _all = Memory::of_device(&device, 2);
    assert_eq!(map(&device, &request(0, own.address(0))), Err(Errno::NOMEM));
}

fn the_limit_is_not_for_who_may_lock_memory(_: &Options) {
    let device = device();
    limit(0);
    let area = Memory::of_device(&device, 64);
    area.write(63, 1);
}
