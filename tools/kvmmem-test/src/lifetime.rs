// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The order in which files, mappings, processes and the module go.

use std::{thread::sleep, time::Duration};

use rustix::{
    mm::MapFlags,
    process::{kill_process, waitpid, Signal, WaitOptions},
};

use crate::{
    arguments::{expect_refused, request},
    counters::counter,
    harness::{test, Options, Test},
    memory::{Memory, RW},
    sys::{device, fork, map, try_unload, unmap, Errno},
};

const AREA: &str = "lifetime";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(the_module_stays_while_a_file_is_open),
    test!(the_module_stays_while_something_is_mapped),
    test!(a_mapping_outlives_its_descriptor),
    test!(memory_may_go_before_the_file),
    test!(anonymous_memory_may_come_back_as_a_mapping),
    test!(killed_processes_leave_nothing),
];

fn the_module_stays_while_a_file_is_open(_: &Options) {
    let _device = device();
    assert_eq!(try_unload(), Err(Errno::AGAIN));
}

fn the_module_stays_while_something_is_mapped(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 1);
    drop(device);
    assert_eq!((counter("files"), counter("areas")), (1, 1));
    assert_eq!(try_unload(), Err(Errno::AGAIN));
    area.write(0, 1);
    assert_eq!(area.read(0), 1);
}

fn a_mapping_outlives_its_descriptor(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 4);
    drop(device);
    // Pages that nobody has touched yet are there, too.
    assert!((0..4).all(|page| area.is_zero(page)));
    area.unmap().expect("it can be unmapped");
    assert_eq!((counter("files"), counter("areas")), (0, 0));
    assert_eq!(counter("processes"), 0);
}

fn memory_may_go_before_the_file(options: &Options) {
    let device = device();
    for _ in 0..options.rounds {
        let area = Memory::of_device(&device, 2);
        let own = Memory::anonymous(2, RW, MapFlags::PRIVATE);
        expect_refused(map(&device, &request(0, area.address(0))), options);
        expect_refused(map(&device, &request(0, own.address(0))), options);
        let gone = [area.address(0), own.address(0)];
        drop((area, own));
        for gva in gone {
            assert_eq!(map(&device, &request(0, gva)), Err(Errno::NOENT));
            assert_eq!(unmap(&device, gva), Err(Errno::NOENT));
        }
    }
    assert_eq!(counter("areas"), 0);
}

fn anonymous_memory_may_come_back_as_a_mapping(options: &Options) {
    let device = device();
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    expect_refused(map(&device, &request(0, own.address(0))), options);
    // SAFETY: nobody has a reference to what was there.
    let area = unsafe {
        rustix::mm::mmap(
            own.at(0).cast(),
            crate::memory::PAGE,
            RW,
            MapFlags::SHARED | MapFlags::FIXED,
            &device,
            0,
        )
    };
    assert_eq!(area.map(<*mut _>::cast), Ok(own.at(0)));
    assert!(own.is_zero(0));
    expect_refused(map(&device, &request(0, own.address(0))), options);
    assert_eq!(unmap(&device, own.address(0)), Err(Errno::NOENT));
}

fn killed_processes_leave_nothing(options: &Options) {
    for round in 0..options.rounds.min(50) {
        let child = fork(|| {
            let device = device();
            let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
            loop {
                let area = Memory::of_device(&device, 64);
                area.write(63, 1);
                expect_refused(map(&device, &request(0, area.address(0))), options);
                expect_refused(map(&device, &request(0, own.address(0))), options);
            }
        });
        sleep(Duration::from_micros(u64::from(round) * 500));
        kill_process(child, Signal::KILL).expect("a child can be killed");
        let _ = waitpid(Some(child), WaitOptions::empty());
        // The death of a process is the end of its memory.
        crate::counters::expect_nothing_left().expect("nothing is left");
    }
}
