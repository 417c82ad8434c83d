// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The module's records of what is mapped, and the host's: they always agree.

use kvmi_abi::mem::{MemMapMany, MAX_MAP_PAGES};
use rustix::{
    mm::MapFlags,
    process::{kill_process, waitpid, Signal, WaitOptions},
};

use crate::{
    counters::{self, counter},
    fake::{self, request, request_many},
    harness::{test, Options, Test},
    memory::{Memory, PAGE, RW},
    sys::{child_status, device, fork, in_child, map, map_many, unmap, unmap_many, Errno},
};

const AREA: &str = "records";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(pages_are_mapped_and_unmapped).needs_fake(),
    test!(a_page_is_mapped_once_at_a_time).needs_fake(),
    test!(thousands_are_mapped_at_once).needs_fake(),
    test!(all_are_mapped_or_none).needs_fake(),
    test!(only_the_file_that_mapped_a_page_unmaps_it).needs_fake(),
    test!(munmap_unmaps).needs_fake(),
    test!(exec_and_exit_unmap).needs_fake(),
    test!(sigkill_unmaps).needs_fake(),
    test!(a_record_outlives_the_memory_of_a_page).needs_fake(),
    test!(a_record_outlives_a_fork).needs_fake(),
    test!(closing_a_file_unmaps_anonymous_pages_only).needs_fake(),
    test!(pages_are_mapped_again_and_again).needs_fake(),
    test!(threads_map_and_unmap_at_once).needs_fake(),
];

/// A place for a page, in a mapping of the device and in memory of one's own.
pub fn places(device: &std::fs::File) -> [Memory; 2] {
    [
        Memory::of_device(device, 1),
        Memory::anonymous(1, RW, MapFlags::PRIVATE),
    ]
}

/// Both sides have so many pages mapped, apart from those in quarantine.
#[track_caller]
pub fn expect_mapped(count: i64) {
    assert_eq!(counter("mapped"), count);
    assert_eq!(fake::get("foreign") - counter("quarantined"), count);
}

fn pages_are_mapped_and_unmapped(_: &Options) {
    let device = device();
    for memory in places(&device) {
        for _ in 0..3 {
            assert_eq!(map(&device, &request(0x1000, memory.address(0))), Ok(()));
            expect_mapped(1);
            assert_eq!(unmap(&device, memory.address(0)), Ok(()));
            expect_mapped(0);
            assert_eq!(counter("pinned"), 0);
            assert_eq!(unmap(&device, memory.address(0)), Err(Errno::NOENT));
        }
    }
}

fn a_page_is_mapped_once_at_a_time(_: &Options) {
    let (device, other) = (device(), device());
    for memory in places(&device) {
        let gva = memory.address(0);
        assert_eq!(map(&device, &request(0, gva)), Ok(()));
        let again = request(0x1000, gva);
        assert_eq!(map(&device, &again), Err(Errno::ALREADY));
        map(&other, &again).expect_err("another file may not, either");
        expect_mapped(1);
        assert_eq!(unmap(&device, gva), Ok(()));
        assert_eq!(map(&device, &again), Ok(()));
        assert_eq!(map(&device, &again), Err(Errno::ALREADY));
        assert_eq!(unmap(&device, gva), Ok(()));
        // That token is used up.
        assert_eq!(map(&device, &again), Err(Errno::NOENT));
    }
}

fn thousands_are_mapped_at_once(_: &Options) {
    const PAGES: usize = 4096;
    let device = device();
    let area = Memory::of_device(&device, PAGES);
    let gpas: Vec<u64> = (0..PAGES).map(|page| (page * PAGE) as u64).collect();
    let calls = fake::get("calls");
    for (chunk, gpas) in gpas.chunks(MAX_MAP_PAGES as usize).enumerate() {
        let first = area.address(chunk * MAX_MAP_PAGES as usize);
        assert_eq!(map_many(&device, &request_many(gpas, first)), Ok(()));
    }
    assert_eq!(fake::get("calls") - calls, 16);
    expect_mapped(PAGES as i64);
    // One alone; some in the middle; then all the others, of which there are gaps between.
    assert_eq!(unmap(&device, area.address(7)), Ok(()));
    assert_eq!(unmap_many(&device, area.address(1000), 1000), Ok(1000));
    assert_eq!(unmap_many(&device, area.address(1000), 1000), Ok(0));
    expect_mapped(PAGES as i64 - 1001);
    let calls = fake::get("calls");
    assert_eq!(
        unmap_many(&device, area.address(0), PAGES as u32),
        Ok(PAGES - 1001)
    );
    assert_eq!(fake::get("calls") - calls, 7);
    expect_mapped(0);
}

fn all_are_mapped_or_none(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 3);
    let mut gpas = [0, 0x1000, 1 << 50];
    let first = request_many(&gpas, area.address(0));
    assert_eq!(map_many(&device, &first), Err(Errno::FAULT));
    expect_mapped(0);
    // The token is still good, and no page is taken.
    gpas[2] = 0x2000;
    let again = MemMapMany {
        gpas: gpas.as_ptr().addr() as u64,
        ..first
    };
    assert_eq!(map_many(&device, &again), Ok(()));
    expect_mapped(3);
    // One of them is in the way.
    assert_eq!(unmap(&device, area.address(0)), Ok(()));
    let third = request_many(&gpas, area.address(0));
    assert_eq!(map_many(&device, &third), Err(Errno::ALREADY));
    expect_mapped(2);
    assert_eq!(map(&device, &request(0, area.address(0))), Ok(()));
}

fn only_the_file_that_mapped_a_page_unmaps_it(_: &Options) {
    let (device, other) = (device(), device());
    for memory in places(&device) {
        let gva = memory.address(0);
        assert_eq!(map(&device, &request(0, gva)), Ok(()));
        assert_eq!(unmap(&other, gva), Err(Errno::NOENT));
        in_child(|| assert_eq!(unmap(&device, gva), Err(Errno::INVAL)));
        expect_mapped(1);
        assert_eq!(unmap(&device, gva), Ok(()));
    }
}

/// Maps a whole mapping of the device.
#[track_caller]
pub fn full_area(device: &std::fs::File, pages: usize) -> Memory {
    let area = Memory::of_device(device, pages);
    let gpas: Vec<u64> = (0..pages).map(|page| (page * PAGE) as u64).collect();
    for (chunk, gpas) in gpas.chunks(MAX_MAP_PAGES as usize).enumerate() {
        let first = area.address(chunk * MAX_MAP_PAGES as usize);
        assert_eq!(map_many(device, &request_many(gpas, first)), Ok(()));
    }
    area
}

fn munmap_unmaps(_: &Options) {
    let device = device();
    let areas = [full_area(&device, 600), full_area(&device, 3)];
    expect_mapped(603);
    let [first, second] = areas;
    let calls = fake::get("calls");
    // By the time that it returns.
    first.unmap().expect("it can be unmapped");
    expect_mapped(3);
    assert_eq!(fake::get("calls") - calls, 2);
    drop(device);
    expect_mapped(3);
    second.unmap().expect("it can be unmapped");
    expect_mapped(0);
}

fn exec_and_exit_unmap(_: &Options) {
    let status = child_status(|| {
        let device = device();
        let area = full_area(&device, 10);
        let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
        assert_eq!(map(&device, &request(0, own.address(0))), Ok(()));
        std::mem::forget((area, own));
        let error = std::os::unix::process::CommandExt::exec(
            std::process::Command::new("/bin/busybox").arg("true"),
        );
        panic!("{error}");
    });
    assert_eq!(status, 0);
    counters::expect_nothing_left().expect("nothing is left");
    expect_mapped(0);
    in_child(|| {
        let device = device();
        std::mem::forget(full_area(&device, 10));
        std::mem::forget(device);
    });
    counters::expect_nothing_left().expect("nothing is left");
    expect_mapped(0);
}

fn sigkill_unmaps(options: &Options) {
    for round in 0..options.rounds.min(50) {
        let child = fork(|| {
            let device = device();
            let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
            loop {
                let _area = full_area(&device, 300);
                assert_eq!(map(&device, &request(0, own.address(0))), Ok(()));
                assert_eq!(unmap(&device, own.address(0)), Ok(()));
                assert_eq!(map(&device, &request(0, own.address(0))), Ok(()));
                assert_eq!(unmap(&device, own.address(0)), Ok(()));
            }
        });
        std::thread::sleep(std::time::Duration::from_micros(u64::from(round) * 700));
        kill_process(child, Signal::KILL).expect("a child can be killed");
        let _ = waitpid(Some(child), WaitOptions::empty());
        counters::expect_nothing_left().expect("nothing is left");
        expect_mapped(0);
    }
}

fn a_record_outlives_the_memory_of_a_page(_: &Options) {
    let device = device();
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    let gva = own.address(0);
    assert_eq!(map(&device, &request(0, gva)), Ok(()));
    // Another page at the same address is not the one that is mapped.
    for _ in 0..2 {
        // SAFETY: nobody has a reference into it.
        let again = unsafe {
            rustix::mm::mmap_anonymous(
                own.at(0).cast(),
                PAGE,
                RW,
                MapFlags::PRIVATE | MapFlags::FIXED,
            )
        };
        assert_eq!(again.map(<*mut _>::cast), Ok(own.at(0)));
        own.write(0, 0x77);
        assert_eq!(map(&device, &request(0, gva)), Err(Errno::ALREADY));
        assert_eq!((counter("mapped"), counter("pinned")), (1, 1));
    }
    own.unmap().expect("it can be unmapped");
    expect_mapped(1);
    assert_eq!(unmap(&device, gva), Ok(()));
    expect_mapped(0);
    assert_eq!(counter("pinned"), 0);
}

fn a_record_outlives_a_fork(_: &Options) {
    let device = device();
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    own.write(0, 1);
    assert_eq!(map(&device, &request(0, own.address(0))), Ok(()));
    // The child gets a copy; the page stays the parent's, also when either writes.
    in_child(|| own.write(0, 2));
    own.write(0, 3);
    in_child(|| assert_eq!(own.read(0), 3));
    expect_mapped(1);
    assert_eq!(unmap(&device, own.address(0)), Ok(()));
    expect_mapped(0);
    assert_eq!(own.read(0), 3);
}

fn closing_a_file_unmaps_anonymous_pages_only(_: &Options) {
    let device = device();
    let area = full_area(&device, 2);
    let own = Memory::anonymous(3, RW, MapFlags::PRIVATE);
    for page in 0..3 {
        assert_eq!(map(&device, &request(0, own.address(page))), Ok(()));
    }
    assert_eq!(counter("pinned"), 3);
    expect_mapped(5);
    drop(device);
    expect_mapped(2);
    assert_eq!(counter("pinned"), 0);
    // The addresses are free for another file.
    let other = crate::sys::device();
    assert_eq!(map(&other, &request(0, own.address(0))), Ok(()));
    area.unmap().expect("it can be unmapped");
    expect_mapped(1);
}

fn pages_are_mapped_again_and_again(options: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 4);
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    for round in 0..options.rounds as usize * 10 {
        for gva in [area.address(round % 4), own.address(0)] {
            assert_eq!(map(&device, &request(0, gva)), Ok(()));
            assert_eq!(unmap(&device, gva), Ok(()));
        }
    }
    expect_mapped(0);
}

fn threads_map_and_unmap_at_once(options: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 16);
    let own = Memory::anonymous(2, RW, MapFlags::PRIVATE);
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (device, area, own) = (&device, &area, &own);
            scope.spawn(move || {
                let gpas = [0, 0x1000, 0x2000, 0x3000];
                for round in 0..options.rounds as usize {
                    let page = (round + 3 * worker) % 12;
                    let _ = map_many(device, &request_many(&gpas, area.address(page)));
                    let _ = map(device, &request(0, own.address(round % 2)));
                    let _ = map(device, &request(0, area.address(page)));
                    let _ = unmap(device, area.address(round % 16));
                    let _ = unmap_many(device, area.address(page), 3);
                    let _ = unmap(device, own.address(round % 2));
                    // Ends while others are at it, and has pages mapped.
                    let brief = Memory::of_device(device, 2);
                    assert_eq!(map(device, &request(0, brief.address(1))), Ok(()));
                }
            });
        }
    });
    let _ = unmap_many(&device, area.address(0), 16);
    let _ = unmap(&device, own.address(0));
    let _ = unmap(&device, own.address(1));
    expect_mapped(0);
    assert_eq!(counter("pinned"), 0);
}
