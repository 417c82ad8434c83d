// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Hosts that do not do what they are asked for.

use rustix::mm::MapFlags;

use crate::{
    counters::{self, counter},
    fake::{self, fail_map, fail_unmap, request, request_many},
    harness::{test, Options, Test},
    memory::{Memory, RW},
    records::{expect_mapped, full_area, places},
    sys::{device, in_child, map, map_many, unmap, unmap_many, Errno},
};

const AREA: &str = "refusal";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(errors_of_mapping_have_names).needs_fake(),
    test!(a_page_that_is_not_unmapped_is_quarantined).needs_fake(),
    test!(a_page_at_the_end_of_a_mapping_is_quarantined).needs_fake(),
    test!(a_page_among_many_is_quarantined).needs_fake(),
    test!(a_page_at_the_end_of_a_process_is_quarantined).needs_fake(),
    test!(a_page_that_the_host_has_forgotten_is_ones_own).needs_fake(),
    test!(a_host_that_is_busy_is_asked_again).needs_fake(),
    test!(a_host_that_is_gone_keeps_its_pages).needs_fake(),
];

/// So many more pages are in quarantine, and none of them is in use as anything else.
#[track_caller]
fn expect_quarantined(before: i64, more: i64) {
    assert_eq!(counter("quarantined") - before, more);
    assert_eq!(
        fake::get("foreign"),
        counter("quarantined") + counter("mapped")
    );
    assert_eq!(fake::get("complaints"), 0);
}

fn errors_of_mapping_have_names(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 2);
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    let gpas = [0; 2];
    for (code, expected) in [
        (1, Errno::PERM),
        (2, Errno::NOENT),
        (7, Errno::TOOBIG),
        (11, Errno::AGAIN),
        (12, Errno::NOMEM),
        (14, Errno::FAULT),
        (16, Errno::BUSY),
        (22, Errno::INVAL),
        (114, Errno::ALREADY),
        (1000, Errno::OPNOTSUPP),
        // Nobody knows what these mean.
        (3, Errno::IO),
        (512, Errno::IO),
        (100_000, Errno::IO),
    ] {
        fail_map(code, 3);
        for gva in [area.address(0), own.address(0)] {
            assert_eq!(map(&device, &request(0, gva)), Err(expected));
            assert_eq!(unmap(&device, gva), Err(Errno::NOENT));
        }
        let many = request_many(&gpas, area.address(0));
        assert_eq!(map_many(&device, &many), Err(expected));
        expect_mapped(0);
    }
    // After all that, everything is possible.
    assert_eq!(map(&device, &request(0, area.address(0))), Ok(()));
    assert_eq!(map(&device, &request(0, own.address(0))), Ok(()));
}

fn a_page_that_is_not_unmapped_is_quarantined(_: &Options) {
    let device = device();
    let before = counter("quarantined");
    for (nth, memory) in (1..).zip(places(&device)) {
        let gva = memory.address(0);
        assert_eq!(map(&device, &request(0, gva)), Ok(()));
        fail_unmap(14, 1, 0);
        assert_eq!(unmap(&device, gva), Err(Errno::FAULT));
        expect_quarantined(before, nth);
        assert_eq!(counter("mapped"), 0);
        // There is no record any more, but the page is still at its address.
        assert_eq!(unmap(&device, gva), Err(Errno::NOENT));
        memory.write(0, 1);
        assert_eq!(map(&device, &request(0, gva)), Err(Errno::ALREADY));
        memory.unmap().expect("it can be unmapped");
        expect_quarantined(before, nth);
    }
}

fn a_page_at_the_end_of_a_mapping_is_quarantined(_: &Options) {
    let device = device();
    let before = counter("quarantined");
    let area = full_area(&device, 2);
    // Once in a batch, and once more on its own.
    fail_unmap(14, 2, 1);
    area.unmap().expect("munmap() succeeds");
    expect_quarantined(before, 1);
    assert_eq!((counter("mapped"), counter("area_pages")), (0, 0));
    // Whatever the allocator gives out now, it is not that page: the host would not map it twice.
    drop(full_area(&device, 1000));
    expect_quarantined(before, 1);
}

fn a_page_among_many_is_quarantined(_: &Options) {
    let device = device();
    let before = counter("quarantined");
    let area = full_area(&device, 1200);
    // In the first batch, and at the begin of another one.
    fail_unmap(22, 1, 100);
    assert_eq!(unmap_many(&device, area.address(0), 600), Ok(600));
    // The host was asked once more about that page, and then did it.
    expect_quarantined(before, 0);
    fail_unmap(22, 2, 100);
    assert_eq!(
        unmap_many(&device, area.address(600), 600),
        Err(Errno::INVAL)
    );
    expect_quarantined(before, 1);
    expect_mapped(0);

    let area = full_area(&device, 1200);
    fail_unmap(22, i64::from(i32::MAX), 0);
    area.unmap().expect("munmap() succeeds");
    fail_unmap(0, 0, 0);
    expect_quarantined(before, 1201);
}

fn a_page_at_the_end_of_a_process_is_quarantined(_: &Options) {
    let before = counter("quarantined");
    in_child(|| {
        let device = device();
        let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
        assert_eq!(map(&device, &request(0, own.address(0))), Ok(()));
        std::mem::forget((full_area(&device, 1), own));
        fail_unmap(22, 4, 0);
        std::mem::forget(device);
    });
    counters::expect_nothing_left().expect("nothing is left");
    fail_unmap(0, 0, 0);
    expect_quarantined(before, 2);
}

fn a_page_that_the_host_has_forgotten_is_ones_own(_: &Options) {
    let device = device();
    let before = counter("quarantined");
    let foreign = fake::get("foreign");
    for memory in places(&device) {
        assert_eq!(map(&device, &request(0, memory.address(0))), Ok(()));
        fake::set("forget", 1);
        assert_eq!(unmap(&device, memory.address(0)), Ok(()));
    }
    let area = full_area(&device, 600);
    fake::set("forget", 1);
    assert_eq!(unmap_many(&device, area.address(0), 600), Ok(600));
    assert_eq!(counter("quarantined"), before);
    assert_eq!((counter("mapped"), fake::get("foreign")), (0, foreign));
}

fn a_host_that_is_busy_is_asked_again(_: &Options) {
    let device = device();
    let before = counter("quarantined");
    for errno in [11, 12, 16] {
        for memory in places(&device) {
            assert_eq!(map(&device, &request(0, memory.address(0))), Ok(()));
            fail_unmap(errno, 5, 0);
            assert_eq!(unmap(&device, memory.address(0)), Ok(()));
        }
    }
    expect_quarantined(before, 0);
    // But not for ever.
    let area = full_area(&device, 1);
    fail_unmap(16, i64::from(i32::MAX), 0);
    assert_eq!(unmap(&device, area.address(0)), Err(Errno::BUSY));
    fail_unmap(0, 0, 0);
    expect_quarantined(before, 1);
}

fn a_host_that_is_gone_keeps_its_pages(_: &Options) {
    let device = device();
    let before = counter("quarantined");
    let area = full_area(&device, 3);
    fail_unmap(1000, i64::from(i32::MAX), 0);
    assert_eq!(
        unmap_many(&device, area.address(0), 3),
        Err(Errno::OPNOTSUPP)
    );
    fail_unmap(0, 0, 0);
    expect_quarantined(before, 3);
}
