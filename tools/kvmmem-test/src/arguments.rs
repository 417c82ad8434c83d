// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the ioctls say to arguments that are wrong, and to those that only the host can refuse.

use std::{fs::File, ptr};

use kvmi_abi::{
    mem::{
        MemMap, MemMapMany, MemUnmapMany, MAX_AREA_PAGES, MEM_MAP, MEM_MAP_MANY, MEM_UNMAP_COMPAT,
        MEM_UNMAP_MANY,
    },
    token::{MapToken, TOKEN_SIZE},
};
use rustix::mm::{madvise, mprotect, Advice, MapFlags, MprotectFlags, ProtFlags};

use crate::{
    counters::counter,
    fake,
    harness::{test, Options, Test},
    memory::{Memory, PAGE, RW},
    sys::{device, ioctl, map, map_many, unmap, unmap_many, Errno},
};

const AREA: &str = "arguments";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(unknown_ioctls_are_refused),
    test!(memory_that_cannot_be_read_is_efault),
    test!(addresses_are_page_aligned),
    test!(counts_are_limited),
    test!(padding_is_zero),
    test!(what_is_not_mapped_cannot_be_unmapped),
    test!(only_memory_of_ones_own_can_be_replaced),
    test!(huge_pages_are_refused),
    test!(bulk_is_for_one_mapping_of_the_device),
    test!(an_unknown_token_maps_nothing),
    test!(a_refused_page_can_be_tried_again),
];

/// What the host says to a token that does not exist.
pub fn expect_refused(result: Result<(), Errno>, options: &Options) {
    let expected = match options.host {
        None if !fake::is_present() => Errno::OPNOTSUPP,
        _ => Errno::NOENT,
    };
    assert_eq!(result, Err(expected));
}

/// A token that nobody has.
const UNKNOWN: MapToken = MapToken {
    bytes: [!0; TOKEN_SIZE],
};

/// A request with a token that nobody has.
pub fn request(gpa: u64, gva: usize) -> MemMap {
    MemMap {
        token: UNKNOWN,
        gpa,
        gva: gva as u64,
    }
}

/// A request for many pages with a token that nobody has.
pub fn request_many(gpas: &[u64], gva: usize) -> MemMapMany {
    MemMapMany {
        token: UNKNOWN,
        gva: gva as u64,
        gpas: gpas.as_ptr().addr() as u64,
        count: gpas.len() as u32,
        padding: 0,
    }
}

fn unknown_ioctls_are_refused(_: &Options) {
    let device = device();
    for number in [
        0,
        0x5401,
        MEM_MAP + 0x10,
        MEM_MAP | 0x8000_0000,
        MEM_UNMAP_COMPAT,
    ] {
        assert_eq!(ioctl(&device, number, 0), Err(Errno::NOTTY), "{number:#x}");
    }
}

fn memory_that_cannot_be_read_is_efault(_: &Options) {
    let device = device();
    let unreadable = Memory::anonymous(1, ProtFlags::empty(), MapFlags::PRIVATE);
    for arg in [0, 8, unreadable.address(0), usize::MAX - 7, 1 << 47] {
        for number in [MEM_MAP, MEM_MAP_MANY, MEM_UNMAP_MANY] {
            assert_eq!(ioctl(&device, number, arg), Err(Errno::FAULT), "{arg:#x}");
        }
    }
    // The array of a request that is in order itself; and one of which the end is missing.
    let area = Memory::of_device(&device, 2);
    let short = Memory::anonymous(2, RW, MapFlags::PRIVATE);
    let mut request = request_many(&[0; 2], area.address(0));
    request.gpas = unreadable.address(0) as u64;
    assert_eq!(map_many(&device, &request), Err(Errno::FAULT));
    // SAFETY: nobody has a reference into it.
    unsafe { mprotect(short.at(1).cast(), PAGE, MprotectFlags::empty()) }
        .expect("memory can be protected");
    request.gpas = short.address(1) as u64 - 8;
    assert_eq!(map_many(&device, &request), Err(Errno::FAULT));
    request.gpas = u64::MAX - 7;
    assert_eq!(map_many(&device, &request), Err(Errno::FAULT));
}

fn addresses_are_page_aligned(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 1);
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    for memory in [&area, &own] {
        for off in [1, 8, 0x800, PAGE - 1] {
            let gva = memory.address(0) + off;
            assert_eq!(map(&device, &request(0, gva)), Err(Errno::INVAL));
            assert_eq!(
                map(&device, &request(off as u64, memory.address(0))),
                Err(Errno::INVAL)
            );
            assert_eq!(
                map_many(&device, &request_many(&[0], gva)),
                Err(Errno::INVAL)
            );
            assert_eq!(
                map_many(&device, &request_many(&[off as u64], memory.address(0))),
                Err(Errno::INVAL)
            );
            assert_eq!(unmap(&device, gva), Err(Errno::INVAL));
            assert_eq!(unmap_many(&device, gva, 1), Err(Errno::INVAL));
        }
    }
}

fn counts_are_limited(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 300);
    let gpas = [0; 300];
    assert_eq!(
        map_many(&device, &request_many(&[], area.address(0))),
        Err(Errno::INVAL)
    );
    assert_eq!(
        map_many(&device, &request_many(&gpas[..257], area.address(0))),
        Err(Errno::TOOBIG)
    );
    let mut huge = request_many(&gpas, area.address(0));
    huge.count = u32::MAX;
    assert_eq!(map_many(&device, &huge), Err(Errno::TOOBIG));
    assert_eq!(unmap_many(&device, area.address(0), 0), Err(Errno::INVAL));
    let too_many = MAX_AREA_PAGES as u32 + 1;
    assert_eq!(
        unmap_many(&device, area.address(0), too_many),
        Err(Errno::TOOBIG)
    );
    // Past the end of the mapping, of the address space, and around it.
    assert_eq!(unmap_many(&device, area.address(0), 301), Err(Errno::INVAL));
    let end = usize::MAX - PAGE + 1;
    assert_eq!(unmap_many(&device, end, 1), Err(Errno::INVAL));
    assert_eq!(unmap_many(&device, end - PAGE, 2), Err(Errno::INVAL));
    assert_eq!(map(&device, &request(0, end)), Err(Errno::INVAL));
    assert_eq!(unmap(&device, end), Err(Errno::INVAL));
}

fn padding_is_zero(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 1);
    let mut request = request_many(&[0], area.address(0));
    request.padding = 1;
    assert_eq!(map_many(&device, &request), Err(Errno::INVAL));
    let request = MemUnmapMany {
        gva: area.address(0) as u64,
        count: 1,
        padding: 1,
    };
    assert_eq!(
        ioctl(&device, MEM_UNMAP_MANY, ptr::from_ref(&request).addr()),
        Err(Errno::INVAL)
    );
}

fn what_is_not_mapped_cannot_be_unmapped(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 4);
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    for gva in [0, PAGE, area.address(0), area.address(3), own.address(0)] {
        assert_eq!(unmap(&device, gva), Err(Errno::NOENT));
    }
    assert_eq!(unmap_many(&device, area.address(0), 4), Ok(0));
}

fn only_memory_of_ones_own_can_be_replaced(_: &Options) {
    let device = device();
    let try_at = |memory: &Memory| map(&device, &request(0, memory.address(0)));

    let shared = Memory::anonymous(1, RW, MapFlags::SHARED);
    assert_eq!(try_at(&shared), Err(Errno::INVAL));
    let program = File::open("/proc/self/exe").expect("the program can be opened");
    for prot in [ProtFlags::READ, RW] {
        let file = Memory::of_file(&program, 1, prot, MapFlags::PRIVATE, 0);
        assert_eq!(
            try_at(&file.expect("a file can be mapped")),
            Err(Errno::INVAL)
        );
    }
    let constant = Memory::anonymous(1, ProtFlags::READ, MapFlags::PRIVATE);
    assert_eq!(try_at(&constant), Err(Errno::ACCESS));
    assert_eq!(map(&device, &request(0, 0)), Err(Errno::NOENT));
    assert_eq!(map(&device, &request(0, 1 << 46)), Err(Errno::NOENT));
    assert_eq!(counter("pinned"), 0);

    // Through another file it is like any other memory that is not anonymous.
    let other = crate::sys::device();
    let area = Memory::of_device(&other, 1);
    assert_eq!(try_at(&area), Err(Errno::INVAL));
    assert_eq!(
        map_many(&device, &request_many(&[0], area.address(0))),
        Err(Errno::INVAL)
    );
    assert_eq!(unmap_many(&device, area.address(0), 1), Err(Errno::INVAL));
}

fn huge_pages_are_refused(options: &Options) {
    const HUGE: usize = 512;
    let device = device();
    let memory = Memory::anonymous(2 * HUGE, RW, MapFlags::PRIVATE);
    let first = (HUGE - memory.address(0) / PAGE % HUGE) % HUGE;
    // SAFETY: this is about how the memory is backed only.
    let advised = unsafe { madvise(memory.at(first).cast(), HUGE * PAGE, Advice::LinuxHugepage) };
    if advised.is_err() {
        return; // There is no such thing.
    }
    memory.write(first, 1);
    let is_huge = std::fs::read_to_string("/proc/self/smaps")
        .expect("smaps can be read")
        .contains("AnonHugePages:      2048 kB");
    let result = map(&device, &request(0, memory.address(first + 1)));
    if is_huge {
        assert_eq!(result, Err(Errno::INVAL));
    } else {
        expect_refused(result, options);
    }
    assert_eq!(counter("pinned"), 0);
}

fn bulk_is_for_one_mapping_of_the_device(_: &Options) {
    let device = device();
    let own = Memory::anonymous(2, RW, MapFlags::PRIVATE);
    let area = Memory::of_device(&device, 2);
    let gpas = [0; 2];
    assert_eq!(
        map_many(&device, &request_many(&gpas, own.address(0))),
        Err(Errno::INVAL)
    );
    assert_eq!(
        map_many(&device, &request_many(&gpas, area.address(1))),
        Err(Errno::INVAL)
    );
    assert_eq!(
        map_many(&device, &request_many(&gpas, area.address(0) - PAGE)),
        Err(Errno::INVAL)
    );
    assert_eq!(unmap_many(&device, own.address(0), 1), Err(Errno::INVAL));
    assert_eq!(unmap_many(&device, area.address(1), 2), Err(Errno::INVAL));
}

fn an_unknown_token_maps_nothing(options: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 256);
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    for memory in [&area, &own] {
        memory.write(0, 0x1234);
        expect_refused(map(&device, &request(0x1000, memory.address(0))), options);
        assert_eq!(memory.read(0), 0x1234);
        assert_eq!(unmap(&device, memory.address(0)), Err(Errno::NOENT));
    }
    // One page by the bulk ioctl is another hypercall than many.
    for count in [1, 2, 256] {
        let gpas: Vec<u64> = (0..count).map(|page| page * PAGE as u64).collect();
        let request = request_many(&gpas, area.address(0));
        expect_refused(map_many(&device, &request), options);
        assert_eq!(area.read(0), 0x1234);
        assert_eq!(unmap_many(&device, area.address(0), 256), Ok(0));
    }
    assert_eq!(counter("mapped"), 0);
    assert_eq!(counter("pinned"), 0);
}

fn a_refused_page_can_be_tried_again(options: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 2);
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    let gpas = [0, 0x1000];
    for _ in 0..options.rounds {
        expect_refused(map(&device, &request(0, area.address(1))), options);
        expect_refused(map(&device, &request(0, own.address(0))), options);
        let request = request_many(&gpas, area.address(0));
        expect_refused(map_many(&device, &request), options);
    }
}
