// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Mappings of the device: what can be made of it, and what cannot be done to it.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    os::{fd::AsRawFd as _, unix::net::UnixStream},
};

use kvmi_abi::mem::MAX_AREA_PAGES;
use rustix::{
    mm::{
        madvise, mprotect, mremap, mremap_fixed, munmap, Advice, MapFlags, MprotectFlags,
        MremapFlags, ProtFlags,
    },
    pipe::pipe,
};

use crate::{
    counters::counter,
    harness::{test, Options, Test},
    memory::{Memory, PAGE, RW},
    sys::{child_status, device, in_child, Errno, DEVICE},
};

const AREA: &str = "mapping";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(pages_are_zero_and_keep_what_is_written),
    test!(it_is_shared_and_for_data_only),
    test!(its_size_is_limited),
    test!(a_file_for_reading_gives_no_right_to_write),
    test!(protection_can_be_changed_as_a_whole),
    test!(it_cannot_be_split),
    test!(it_can_be_neither_moved_nor_resized),
    test!(memory_advice_does_not_lose_pages),
    test!(a_child_does_not_inherit_it),
    test!(devices_cannot_use_it),
    test!(programs_can_write_what_is_in_it),
    test!(its_end_is_its_pages_end),
];

fn pages_are_zero_and_keep_what_is_written(_: &Options) {
    let device = device();
    for pages in [1, 2, 511, 4096] {
        let area = Memory::of_device(&device, pages);
        assert_eq!(counter("area_pages"), pages as i64);
        for page in 0..pages {
            assert_eq!(area.read(page), 0);
        }
        assert!(area.is_zero(pages / 2));
        (0..pages).for_each(|page| area.write(page, page as u64 + 1));
        assert!((0..pages).all(|page| area.read(page) == page as u64 + 1));
    }
}

fn it_is_shared_and_for_data_only(_: &Options) {
    let device = device();
    let error = |prot, flags, offset| Memory::of_file(&device, 2, prot, flags, offset).err();
    for prot in [ProtFlags::READ, RW] {
        assert_eq!(error(prot, MapFlags::PRIVATE, 0), Some(Errno::INVAL));
        assert_eq!(
            error(prot | ProtFlags::EXEC, MapFlags::SHARED, 0),
            Some(Errno::INVAL)
        );
        assert_eq!(
            error(prot, MapFlags::SHARED, PAGE as u64),
            Some(Errno::INVAL)
        );
        assert_eq!(error(prot, MapFlags::SHARED, 0), None);
    }
    assert_eq!(counter("areas"), 0);
}

fn its_size_is_limited(_: &Options) {
    let device = device();
    let too_large = Memory::of_file(&device, MAX_AREA_PAGES + 1, RW, MapFlags::SHARED, 0);
    assert_eq!(too_large.err(), Some(Errno::TOOBIG));
    assert_eq!(counter("area_pages"), 0);
}

fn a_file_for_reading_gives_no_right_to_write(_: &Options) {
    let device = File::open(DEVICE).expect("the device can be opened for reading");
    let writable = Memory::of_file(&device, 1, RW, MapFlags::SHARED, 0);
    assert_eq!(writable.err(), Some(Errno::ACCESS));
    let area = Memory::of_file(&device, 1, ProtFlags::READ, MapFlags::SHARED, 0)
        .expect("it can be mapped for reading");
    assert!(area.is_zero(0));
    assert_eq!(
        protect(&area, 0, 1, MprotectFlags::WRITE),
        Err(Errno::ACCESS)
    );
    assert_segv(|| area_write_in_child(&device));

    let write_only = OpenOptions::new().write(true).open(DEVICE);
    let write_only = write_only.expect("the device can be opened for writing");
    let unreadable = Memory::of_file(&write_only, 1, RW, MapFlags::SHARED, 0);
    assert_eq!(unreadable.err(), Some(Errno::ACCESS));
}

/// In a child, which has to open the device itself.
fn area_write_in_child(_: &File) {
    let device = File::open(DEVICE).expect("the device can be opened");
    let area = Memory::of_file(&device, 1, ProtFlags::READ, MapFlags::SHARED, 0);
    area.expect("it can be mapped").write(0, 1);
}

/// Runs `action` in a child and expects it to end by SIGSEGV.
#[track_caller]
fn assert_segv(action: impl FnOnce()) {
    let status = child_status(action);
    assert!(libc::WIFSIGNALED(status), "wait status {status:#x}");
    assert_eq!(libc::WTERMSIG(status), libc::SIGSEGV);
}

/// mprotect() of some pages.
fn protect(area: &Memory, page: usize, pages: usize, flags: MprotectFlags) -> Result<(), Errno> {
    // SAFETY: the tests access the memory as its protection allows.
    unsafe { mprotect(area.at(page).cast(), pages * PAGE, flags) }
}

fn protection_can_be_changed_as_a_whole(_: &Options) {
    let device = device();
    let area = Memory::of_file(&device, 2, ProtFlags::READ, MapFlags::SHARED, 0)
        .expect("it can be mapped for reading");
    assert_eq!(area.read(1), 0);
    assert_eq!(
        protect(&area, 0, 2, MprotectFlags::READ | MprotectFlags::WRITE),
        Ok(())
    );
    area.write(1, 7);
    assert_eq!(protect(&area, 0, 2, MprotectFlags::READ), Ok(()));
    assert_eq!(area.read(1), 7);
    assert_eq!(
        protect(&area, 0, 2, MprotectFlags::EXEC),
        Err(Errno::ACCESS)
    );
    assert_eq!(
        protect(&area, 0, 1, MprotectFlags::READ | MprotectFlags::WRITE),
        Err(Errno::INVAL)
    );
}

fn it_cannot_be_split(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 4);
    (0..4).for_each(|page| area.write(page, page as u64));
    for (page, pages) in [(0, 1), (1, 2), (3, 1)] {
        // SAFETY: this is refused.
        let result = unsafe { munmap(area.at(page).cast(), pages * PAGE) };
        assert_eq!(result, Err(Errno::INVAL));
        // SAFETY: as above.
        let over = unsafe {
            libc::mmap(
                area.at(page).cast(),
                pages * PAGE,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        assert_eq!(over, libc::MAP_FAILED);
    }
    assert!((0..4).all(|page| area.read(page) == page as u64));
    assert_eq!(counter("areas"), 1);
}

fn it_can_be_neither_moved_nor_resized(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 4);
    let target = Memory::anonymous(8, RW, MapFlags::PRIVATE);
    (0..4).for_each(|page| area.write(page, page as u64));
    let start = area.at(0).cast();
    let all = 4 * PAGE;
    // SAFETY: each of these is refused, so that nothing changes.
    unsafe {
        let to = target.at(0).cast();
        mremap_fixed(start, all, all, MremapFlags::MAYMOVE, to).expect_err("moving");
        // The place is free now: the kernel had emptied it before it asked.
        mremap(start, all, 2 * all, MremapFlags::MAYMOVE).expect_err("growing");
        mremap(start, all, PAGE, MremapFlags::MAYMOVE).expect_err("shrinking");
        mremap(start, 0, all, MremapFlags::MAYMOVE).expect_err("duplicating");
        mremap(
            area.at(1).cast(),
            PAGE,
            PAGE,
            MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP,
        )
        .expect_err("leaving empty");
    }
    assert!((0..4).all(|page| area.read(page) == page as u64));
    assert_eq!(counter("areas"), 1);
}

fn memory_advice_does_not_lose_pages(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 4);
    (0..4).for_each(|page| area.write(page, page as u64 + 1));
    let advise = |advice| {
        // SAFETY: what the pages hold is looked at below, and nobody has a reference to it.
        unsafe { madvise(area.at(0).cast(), 4 * PAGE, advice) }
    };
    for advice in [
        Advice::LinuxDontNeed,
        Advice::LinuxPageOut,
        Advice::LinuxCold,
    ] {
        let _ = advise(advice);
        assert!((0..4).all(|page| area.read(page) == page as u64 + 1));
    }
    for advice in [
        Advice::LinuxDoFork,
        Advice::LinuxDoDump,
        Advice::LinuxFree,
        Advice::LinuxRemove,
        Advice::LinuxMergeable,
        Advice::LinuxWipeOnFork,
    ] {
        // Merging is not an error, and does nothing.
        if advise(advice).is_ok() {
            assert_eq!(advice, Advice::LinuxMergeable);
        }
    }
    assert!((0..4).all(|page| area.read(page) == page as u64 + 1));
}

fn a_child_does_not_inherit_it(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 2);
    area.write(0, 5);
    in_child(|| assert!(!area.is_mapped(0) && !area.is_mapped(1)));
    assert_segv(|| assert_eq!(area.read(0), 5));
    assert_eq!(area.read(0), 5);
}

fn devices_cannot_use_it(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 1);
    area.write(0, 1);
    let (_reader, writer) = pipe().expect("a pipe can be made");
    let part = libc::iovec {
        iov_base: area.at(0).cast(),
        iov_len: PAGE,
    };
    // SAFETY: the pipe would hold the page, which is refused.
    let spliced = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const part, 1, 0) };
    assert_eq!(spliced, -1);
    let mut copy = [0_u8; PAGE];
    let to = libc::iovec {
        iov_base: copy.as_mut_ptr().cast(),
        iov_len: PAGE,
    };
    // SAFETY: there is room for the page.
    let read =
        unsafe { libc::process_vm_readv(libc::getpid(), &raw const to, 1, &raw const part, 1, 0) };
    assert_eq!(read, -1);
}

fn programs_can_write_what_is_in_it(_: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 1);
    area.write(0, u64::from_le_bytes(*b"contents"));
    let (mut reader, mut writer) = UnixStream::pair().expect("a socket pair can be made");
    // SAFETY: nobody writes to it meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts(area.at(0), 8) };
    writer.write_all(bytes).expect("a socket takes it");
    let mut copy = [0; 8];
    reader.read_exact(&mut copy).expect("it comes out again");
    assert_eq!(&copy, b"contents");
}

fn its_end_is_its_pages_end(_: &Options) {
    let device = device();
    let first = Memory::of_device(&device, 3);
    let second = Memory::of_device(&device, 5);
    assert_eq!((counter("areas"), counter("area_pages")), (2, 8));
    // When munmap() returns, not some time after.
    first.unmap().expect("it can be unmapped");
    assert_eq!((counter("areas"), counter("area_pages")), (1, 5));
    // SAFETY: nobody has a reference into it.
    let over = unsafe {
        rustix::mm::mmap_anonymous(
            second.at(0).cast(),
            5 * PAGE,
            RW,
            MapFlags::PRIVATE | MapFlags::FIXED,
        )
    };
    assert_eq!(over.map(<*mut _>::cast), Ok(second.at(0)));
    assert_eq!((counter("areas"), counter("area_pages")), (0, 0));
}
