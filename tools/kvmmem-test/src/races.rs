// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Everything at once, from many threads and processes.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use rustix::mm::MapFlags;

use crate::{
    arguments::{request, request_many},
    harness::{test, Options, Test},
    memory::{Memory, RW},
    sys::{device, fork, map, map_many, unmap, unmap_many, Errno},
};

const AREA: &str = "races";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(threads_use_one_file),
    test!(threads_use_files_of_their_own),
    test!(processes_come_and_go),
];

/// What may happen if others do the same just now.
fn expect_plausible(result: Result<(), Errno>) {
    if let Err(error) = result {
        let plausible = [
            Errno::OPNOTSUPP,
            Errno::NOENT,
            Errno::ALREADY,
            Errno::INVAL,
            Errno::AGAIN,
            Errno::BUSY,
        ];
        assert!(plausible.contains(&error), "{error}");
    }
}

fn threads_use_one_file(options: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 8);
    let own = Memory::anonymous(2, RW, MapFlags::PRIVATE);
    let gpas = [0; 8];
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut workers = Vec::new();
        for worker in 0..4 {
            let (device, area, own) = (&device, &area, &own);
            workers.push(scope.spawn(move || {
                for round in 0..options.rounds as usize {
                    expect_plausible(map(device, &request(0, area.address((round + worker) % 8))));
                    expect_plausible(map_many(device, &request_many(&gpas, area.address(0))));
                    expect_plausible(map(device, &request(0, own.address(round % 2))));
                    expect_plausible(unmap(device, own.address(round % 2)));
                    let _ = unmap_many(device, area.address(0), 8);
                    // Memory that goes while others may be at it.
                    let brief = Memory::of_device(device, 2);
                    brief.write(1, round as u64);
                    expect_plausible(map(device, &request(0, brief.address(0))));
                }
            }));
        }
        // Who looks where nothing is, or where something is no longer.
        scope.spawn(|| {
            while !over.load(Relaxed) {
                for page in 0..8 {
                    let gva = area.address(0) + (8 + page) * 4096;
                    let _ = unmap(&device, gva);
                    let _ = unmap_many(&device, gva, 2);
                    let _ = map(&device, &request(0, gva));
                }
            }
        });
        workers.into_iter().for_each(|worker| {
            worker.join().expect("the thread does not panic");
        });
        over.store(true, Relaxed);
    });
}

fn threads_use_files_of_their_own(options: &Options) {
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..options.rounds {
                    let device = device();
                    let area = Memory::of_device(&device, 3);
                    expect_plausible(map(&device, &request(0, own.address(0))));
                    expect_plausible(map(&device, &request(0, area.address(2))));
                    drop(device);
                    area.write(0, 1);
                }
            });
        }
    });
}

fn processes_come_and_go(options: &Options) {
    for _ in 0..options.rounds.div_ceil(10) {
        let children = [(); 4].map(|()| {
            fork(|| {
                let device = device();
                let area = Memory::of_device(&device, 16);
                area.write(15, 1);
                expect_plausible(map(&device, &request(0, area.address(0))));
            })
        });
        for child in children {
            let ended =
                rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
            let (_, status) = ended
                .expect("a child can be waited for")
                .expect("it has ended");
            assert_eq!(status.as_raw(), 0);
        }
    }
}
