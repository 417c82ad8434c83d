// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Pages that are another VM's, with the help of the host.

use kvmi_abi::mem::{MemMap, MemMapMany, MAX_MAP_PAGES};
use rustix::mm::MapFlags;

use crate::{
    counters::counter,
    harness::{test, Options, Test},
    host::Host,
    memory::{Memory, PAGE, RW},
    sys::{device, in_child, map, map_many, unmap, unmap_many, Errno},
};

const AREA: &str = "mapped";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(both_vms_see_the_same_page).needs_host(),
    test!(a_token_is_good_for_one_success).needs_host(),
    test!(a_page_is_mapped_once_at_a_time).needs_host(),
    test!(many_pages_are_mapped_at_once).needs_host(),
    test!(all_are_mapped_or_none).needs_host(),
    test!(only_the_file_that_mapped_a_page_unmaps_it).needs_host(),
    test!(memory_may_go_while_it_is_mapped).needs_host(),
    test!(a_process_may_end_while_its_memory_is_mapped).needs_host(),
    test!(pages_are_mapped_again_and_again).needs_host(),
];

/// A place for a page, in a mapping of the device or in memory of one's own.
fn places(device: &std::fs::File) -> [Memory; 2] {
    [
        Memory::of_device(device, 1),
        Memory::anonymous(1, RW, MapFlags::PRIVATE),
    ]
}

fn request(host: &mut Host, gpa: u64, gva: usize) -> MemMap {
    MemMap {
        token: host.token(),
        gpa,
        gva: gva as u64,
    }
}

fn request_many(host: &mut Host, gpas: &[u64], gva: usize) -> MemMapMany {
    MemMapMany {
        token: host.token(),
        gva: gva as u64,
        gpas: gpas.as_ptr().addr() as u64,
        count: gpas.len() as u32,
        padding: 0,
    }
}

fn both_vms_see_the_same_page(options: &Options) {
    let mut host = Host::new(options);
    let (gpa, _) = host.pages();
    let device = device();
    for memory in places(&device) {
        memory.write(0, 1);
        host.write(gpa, 2);
        let request = request(&mut host, gpa, memory.address(0));
        assert_eq!(map(&device, &request), Ok(()));
        assert_eq!(counter("mapped"), 1);
        assert_eq!(memory.read(0), 2);
        memory.write(0, 3);
        assert_eq!(host.read(gpa), 3);
        host.write(gpa, 4);
        assert_eq!(memory.read(0), 4);

        assert_eq!(unmap(&device, memory.address(0)), Ok(()));
        assert_ne!(memory.read(0), 4);
        memory.write(0, 5);
        assert_eq!(host.read(gpa), 4);
        assert_eq!(unmap(&device, memory.address(0)), Err(Errno::NOENT));
    }
    assert_eq!((counter("mapped"), counter("pinned")), (0, 0));
}

fn a_token_is_good_for_one_success(options: &Options) {
    let mut host = Host::new(options);
    let (gpa, _) = host.pages();
    let device = device();
    let area = Memory::of_device(&device, 2);
    let mut request = request(&mut host, gpa, area.address(0));
    // No success, and no use.
    request.gpa = 1 << 50;
    map(&device, &request).expect_err("there is no such page");
    request.gpa = gpa;
    assert_eq!(map(&device, &request), Ok(()));
    request.gva = area.address(1) as u64;
    assert_eq!(map(&device, &request), Err(Errno::NOENT));
}

fn a_page_is_mapped_once_at_a_time(options: &Options) {
    let mut host = Host::new(options);
    let (gpa, _) = host.pages();
    let (device, other) = (device(), device());
    for memory in places(&device) {
        let first = request(&mut host, gpa, memory.address(0));
        assert_eq!(map(&device, &first), Ok(()));
        let second = request(&mut host, gpa + PAGE as u64, memory.address(0));
        assert_eq!(map(&device, &second), Err(Errno::ALREADY));
        map(&other, &second).expect_err("another file may not, either");
        assert_eq!(unmap(&device, memory.address(0)), Ok(()));
        assert_eq!(map(&device, &second), Ok(()));
    }
}

fn many_pages_are_mapped_at_once(options: &Options) {
    let mut host = Host::new(options);
    let (gpa, pages) = host.pages();
    let device = device();
    let area = Memory::of_device(&device, pages);
    let gpas: Vec<u64> = (0..pages).map(|page| gpa + (page * PAGE) as u64).collect();
    for (page, &gpa) in gpas.iter().enumerate().step_by(17) {
        host.write(gpa, page as u64 + 1);
    }
    for (chunk, gpas) in gpas.chunks(MAX_MAP_PAGES as usize).enumerate() {
        let first = area.address(chunk * MAX_MAP_PAGES as usize);
        let request = request_many(&mut host, gpas, first);
        assert_eq!(map_many(&device, &request), Ok(()));
    }
    assert_eq!(counter("mapped"), pages as i64);
    for page in (0..pages).step_by(17) {
        assert_eq!(area.read(page), page as u64 + 1);
    }
    // One of them alone, and then what is left.
    assert_eq!(unmap(&device, area.address(3)), Ok(()));
    assert_eq!(
        unmap_many(&device, area.address(0), pages as u32),
        Ok(pages - 1)
    );
    assert_eq!(counter("mapped"), 0);
    assert_eq!(unmap_many(&device, area.address(0), pages as u32), Ok(0));
}

fn all_are_mapped_or_none(options: &Options) {
    let mut host = Host::new(options);
    let (gpa, _) = host.pages();
    let device = device();
    let area = Memory::of_device(&device, 3);
    (0..3).for_each(|page| area.write(page, 7));
    let mut gpas = [gpa, gpa + PAGE as u64, 1 << 50];
    let request = request_many(&mut host, &gpas, area.address(0));
    map_many(&device, &request).expect_err("there is no such page");
    assert!((0..3).all(|page| area.read(page) == 7));
    assert_eq!(counter("mapped"), 0);
    // The token is still good.
    gpas[2] = gpa + 2 * PAGE as u64;
    let again = MemMapMany {
        gpas: gpas.as_ptr().addr() as u64,
        ..request
    };
    assert_eq!(map_many(&device, &again), Ok(()));
    assert_eq!(counter("mapped"), 3);
}

fn only_the_file_that_mapped_a_page_unmaps_it(options: &Options) {
    let mut host = Host::new(options);
    let (gpa, _) = host.pages();
    let (device, other) = (device(), device());
    for memory in places(&device) {
        let request = request(&mut host, gpa, memory.address(0));
        assert_eq!(map(&device, &request), Ok(()));
        assert_eq!(unmap(&other, memory.address(0)), Err(Errno::NOENT));
        in_child(|| assert_eq!(unmap(&device, memory.address(0)), Err(Errno::INVAL)));
        assert_eq!(unmap(&device, memory.address(0)), Ok(()));
    }
}

fn memory_may_go_while_it_is_mapped(options: &Options) {
    let mut host = Host::new(options);
    let (gpa, _) = host.pages();
    let device = device();
    let [area, own] = places(&device);
    let (of_area, of_own) = (area.address(0), own.address(0));
    let request_area = request(&mut host, gpa, of_area);
    assert_eq!(map(&device, &request_area), Ok(()));
    let request_own = request(&mut host, gpa + PAGE as u64, of_own);
    assert_eq!(map(&device, &request_own), Ok(()));

    area.unmap().expect("it can be unmapped");
    assert_eq!(counter("mapped"), 1);
    // This one is known by its address, until it is unmapped or the file is closed.
    own.unmap().expect("it can be unmapped");
    assert_eq!((counter("mapped"), counter("pinned")), (1, 1));
    assert_eq!(unmap(&device, of_own), Ok(()));
    assert_eq!((counter("mapped"), counter("pinned")), (0, 0));
}

fn a_process_may_end_while_its_memory_is_mapped(options: &Options) {
    let mut host = Host::new(options);
    let (gpa, _) = host.pages();
    for _ in 0..20 {
        in_child(|| {
            let device = device();
            for memory in places(&device) {
                let request = request(&mut host, gpa, memory.address(0));
                assert_eq!(map(&device, &request), Ok(()));
                std::mem::forget(memory);
            }
            std::mem::forget(device);
        });
        crate::counters::expect_nothing_left().expect("nothing is left");
    }
}

fn pages_are_mapped_again_and_again(options: &Options) {
    let mut host = Host::new(options);
    let (gpa, _) = host.pages();
    let device = device();
    let area = Memory::of_device(&device, 4);
    for round in 0..options.rounds as usize {
        let gva = area.address(round % 4);
        let request = request(&mut host, gpa, gva);
        assert_eq!(map(&device, &request), Ok(()));
        area.write(round % 4, round as u64);
        assert_eq!(unmap(&device, gva), Ok(()));
    }
    assert_eq!(host.read(gpa), u64::from(options.rounds) - 1);
}
