// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Pages of one VM in another one: what is seen there, and when it ends.

use kvmi_abi::{
    access::{ALL, W},
    hypercall::MapEntry,
};

use crate::{
    harness::{test, Ctx, Test},
    mapping_tool::{
        map, number, scene, scene_with, Introspector, EALREADY, EFAULT, EINVAL, ENOENT,
        PAGE_OF_TARGET, WINDOW,
    },
    memory::Memory,
    util::{expect_swap, wait_for},
    vm::{TestVm, PAGE},
};

const AREA: &str = "mapping";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(both_guests_see_what_either_of_them_writes),
    test!(own_page_comes_back_as_it_was),
    test!(page_that_is_read_only_cannot_be_written_to),
    test!(many_pages_are_mapped_by_one_token_or_none),
    test!(mapping_follows_the_memory_of_the_target),
    test!(page_that_is_swapped_out_can_be_mapped),
    test!(mapping_is_lost_when_the_target_may_not_write_itself),
    test!(mappings_end_with_the_session),
    test!(mappings_end_with_the_target),
    test!(mappings_end_with_the_introspector),
    test!(mappings_end_with_a_reset_of_the_guest),
    test!(mappings_end_with_a_memory_slot_of_either_vm),
    test!(writes_are_in_the_dirty_log_of_the_target),
    test!(restrictions_of_the_target_are_not_the_introspectors),
];

fn both_guests_see_what_either_of_them_writes(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    map(&mut tool, &mut introspector);
    introspector.store(WINDOW + 8, 0x1234_5678_9abc_def0);
    assert_eq!(number(&target, PAGE_OF_TARGET + 8), 0x1234_5678_9abc_def0);
    target.memory.write(PAGE_OF_TARGET + 16, &[0x5a; 8]);
    assert_eq!(introspector.load(WINDOW + 16), 0x5a5a_5a5a_5a5a_5a5a);
    // Its VMM still sees the page that it has lent.
    assert_eq!(number(&introspector.vm, WINDOW), !WINDOW);
    // And the pages beside it are its own.
    assert_eq!(
        introspector.load(WINDOW + PAGE as u64),
        !(WINDOW + PAGE as u64)
    );
}

fn own_page_comes_back_as_it_was(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    assert_eq!(introspector.load(WINDOW), !WINDOW);
    for _ in 0..3 {
        map(&mut tool, &mut introspector);
        introspector.store(WINDOW + 8, 1);
        assert_eq!(introspector.unmap(WINDOW), 0);
        assert_eq!(introspector.load(WINDOW), !WINDOW);
        introspector.store(WINDOW + 8, 2);
        assert_eq!(number(&target, PAGE_OF_TARGET + 8), 1);
        assert_eq!(number(&introspector.vm, WINDOW + 8), 2);
        assert_eq!(introspector.unmap(WINDOW), ENOENT);
    }
}

fn page_that_is_read_only_cannot_be_written_to(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    let token = tool.read_only_token();
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), 0);
    assert_eq!(introspector.load(WINDOW), PAGE_OF_TARGET);
    let fault = introspector.store_in_vain(WINDOW, 7);
    assert_eq!((fault.vector, fault.error_code), (13, 0));
    assert_eq!(number(&target, PAGE_OF_TARGET), PAGE_OF_TARGET);
    assert_eq!(number(&introspector.vm, WINDOW), !WINDOW);
}

fn many_pages_are_mapped_by_one_token_or_none(ctx: &Ctx) {
    let first = Memory::new(256 * PAGE);
    let second = Memory::new(256 * PAGE);
    let base = 0x100_0000;
    let (target, mut tool, mut introspector) = scene();
    target.add_slot(1, base, &first);
    introspector.vm.add_slot(1, base, &second);
    let gpa = |nth: usize| base + (nth * PAGE) as u64;
    for nth in 0..256 {
        first.write((nth * PAGE) as u64, &gpa(nth).to_le_bytes());
    }
    // In the opposite order.
    let mut entries: Vec<_> = (0..256)
        .map(|nth| MapEntry {
            target_gpa: gpa(255 - nth),
            gpa: gpa(nth),
        })
        .collect();
    let gpas: Vec<_> = entries.iter().map(|entry| entry.gpa).collect();
    for _ in 0..ctx.rounds(4) {
        let mapped =
            introspector.present(&mut tool, |guest, token| guest.map_many(token, &entries));
        assert_eq!(mapped, 0);
        for nth in [0, 1, 31, 32, 100, 255] {
            assert_eq!(introspector.load(gpa(nth)), gpa(255 - nth), "page {nth}");
        }
        assert_eq!(introspector.unmap_many(&gpas), 256);
        assert_eq!(introspector.load(gpa(7)), 0);
        assert_eq!(introspector.unmap_many(&gpas), ENOENT);
    }
    // One that cannot be mapped, or is named twice, and none is.
    for (wrong, error) in [
        (
            MapEntry {
                target_gpa: 0x4000_0000,
                gpa: gpa(200),
            },
            ENOENT,
        ),
        (
            MapEntry {
                target_gpa: gpa(1),
                gpa: 0x4000_0000,
            },
            EFAULT,
        ),
        (
            MapEntry {
                target_gpa: gpa(1),
                gpa: gpa(3),
            },
            EALREADY,
        ),
        (
            MapEntry {
                target_gpa: gpa(1) + 8,
                gpa: gpa(200),
            },
            EINVAL,
        ),
    ] {
        let right = std::mem::replace(&mut entries[200], wrong);
        let refused =
            introspector.present(&mut tool, |guest, token| guest.map_many(token, &entries));
        assert_eq!(refused, error);
        for nth in [0, 3, 199, 255] {
            assert_eq!(introspector.load(gpa(nth)), 0, "page {nth}");
        }
        entries[200] = right;
    }
    let five = &entries[..5];
    let mapped = introspector.present(&mut tool, |guest, token| guest.map_many(token, five));
    assert_eq!(mapped, 0);
    // What comes behind a page that is not mapped stays so.
    let some = [gpa(0), gpa(1), gpa(9), gpa(2)];
    assert_eq!(introspector.unmap_many(&some), 2);
    assert_eq!(introspector.load(gpa(1)), 0);
    assert_eq!(introspector.load(gpa(2)), gpa(253));
}

fn mapping_follows_the_memory_of_the_target(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    map(&mut tool, &mut introspector);
    for round in 1..=3 {
        target.memory.discard(PAGE_OF_TARGET as usize, PAGE);
        assert_eq!(introspector.load(WINDOW), 0);
        introspector.store(WINDOW + 8, round);
        assert_eq!(number(&target, PAGE_OF_TARGET + 8), round);
        target.memory.write(PAGE_OF_TARGET, &[7; 8]);
        assert_eq!(introspector.load(WINDOW), 0x0707_0707_0707_0707);
    }
}

fn page_that_is_swapped_out_can_be_mapped(_: &Ctx) {
    expect_swap();
    let (target, mut tool, mut introspector) = scene();
    for _ in 0..3 {
        wait_for("the page is swapped out", || {
            target.memory.swap_out();
            target.memory.is_swapped_out(PAGE_OF_TARGET)
        });
        map(&mut tool, &mut introspector);
        wait_for("the page is swapped out while it is mapped", || {
            target.memory.swap_out();
            target.memory.is_swapped_out(PAGE_OF_TARGET)
        });
        assert_eq!(introspector.load(WINDOW), PAGE_OF_TARGET);
        assert_eq!(introspector.unmap(WINDOW), 0);
    }
}

fn mapping_is_lost_when_the_target_may_not_write_itself(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    map(&mut tool, &mut introspector);
    target.memory.allow_writes(false);
    assert_eq!(introspector.load(WINDOW), PAGE_OF_TARGET);
    introspector.store(WINDOW + 8, 5);
    assert_eq!(introspector.load(WINDOW), !WINDOW, "it is its own page");
    target.memory.allow_writes(true);
    assert_eq!(number(&target, PAGE_OF_TARGET + 8), 0);
    assert_eq!(number(&introspector.vm, WINDOW + 8), 5);
    // For good: it has to be mapped anew.
    assert_eq!(introspector.load(WINDOW), !WINDOW);
    assert_eq!(introspector.unmap(WINDOW), 0);
    map(&mut tool, &mut introspector);
}

fn mappings_end_with_the_session(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    map(&mut tool, &mut introspector);
    target.unhook();
    assert_eq!(introspector.load(WINDOW), !WINDOW);
    assert_eq!(introspector.unmap(WINDOW), ENOENT);
    let mut tool = target.hook_allowing_all();
    map(&mut tool, &mut introspector);
    drop(tool);
    wait_for("the page is its own", || {
        introspector.load(WINDOW) == !WINDOW
    });
    target.unhook();
}

fn mappings_end_with_the_target(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    map(&mut tool, &mut introspector);
    drop(target);
    assert_eq!(introspector.load(WINDOW), !WINDOW);
    assert_eq!(introspector.unmap(WINDOW), ENOENT);
}

fn mappings_end_with_the_introspector(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    map(&mut tool, &mut introspector);
    assert_eq!(introspector.appoint(0), Ok(()));
    assert_eq!(introspector.load(WINDOW), !WINDOW);
    assert_eq!(introspector.appoint(1), Ok(()));
    map(&mut tool, &mut introspector);
    drop(introspector);
    assert_eq!(number(&target, PAGE_OF_TARGET), PAGE_OF_TARGET);
    let mut introspector = Introspector::new();
    map(&mut tool, &mut introspector);
}

fn mappings_end_with_a_reset_of_the_guest(_: &Ctx) {
    const PG: u64 = 1 << 31;
    const LMA: u64 = 1 << 10;
    let (target, mut tool, mut introspector) = scene();
    map(&mut tool, &mut introspector);
    introspector.vcpu.with(|fd| {
        let before = fd.get_sregs().expect("KVM_GET_SREGS");
        let mut reset = before;
        reset.cr0 &= !PG;
        reset.efer &= !LMA;
        reset.cs.l = 0;
        fd.set_sregs(&reset).expect("KVM_SET_SREGS");
        fd.set_sregs(&before).expect("KVM_SET_SREGS");
    });
    assert_eq!(introspector.load(WINDOW), !WINDOW);
    introspector.store(WINDOW, 1);
    assert_eq!(number(&target, PAGE_OF_TARGET), PAGE_OF_TARGET);
    assert_eq!(introspector.unmap(WINDOW), ENOENT);
}

fn mappings_end_with_a_memory_slot_of_either_vm(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    let base = 0x100_0000;
    let memory = Memory::new(PAGE);
    memory.write(0, &[1; 8]);
    target.add_slot(1, base, &memory);
    assert_eq!(introspector.map_page(&mut tool, base, WINDOW), 0);
    assert_eq!(introspector.load(WINDOW), 0x0101_0101_0101_0101);
    target.remove_slot(1);
    assert_eq!(introspector.load(WINDOW), !WINDOW);
    assert_eq!(introspector.unmap(WINDOW), ENOENT);

    let own = Memory::new(PAGE);
    introspector.vm.add_slot(1, base, &own);
    assert_eq!(introspector.map_page(&mut tool, PAGE_OF_TARGET, base), 0);
    assert_eq!(introspector.load(base), PAGE_OF_TARGET);
    introspector.vm.remove_slot(1);
    introspector.vm.add_slot(1, base, &own);
    assert_eq!(introspector.load(base), 0);
    assert_eq!(introspector.unmap(base), ENOENT);
}

fn writes_are_in_the_dirty_log_of_the_target(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene_with(TestVm::logging());
    let page = PAGE_OF_TARGET as usize / PAGE;
    map(&mut tool, &mut introspector);
    target.dirty_pages();
    assert_eq!(introspector.load(WINDOW), PAGE_OF_TARGET);
    assert!(!target.dirty_pages().contains(&page), "it was only read");
    for round in 0..3 {
        introspector.store(WINDOW + 8, round);
        introspector.store(WINDOW + 8, round);
        assert!(target.dirty_pages().contains(&page), "round {round}");
        assert!(!target.dirty_pages().contains(&page), "round {round}");
    }
}

fn restrictions_of_the_target_are_not_the_introspectors(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    tool.deny(PAGE_OF_TARGET, W);
    map(&mut tool, &mut introspector);
    introspector.store(WINDOW + 8, 5);
    assert_eq!(number(&target, PAGE_OF_TARGET + 8), 5);
    tool.deny(PAGE_OF_TARGET, ALL);
    introspector.store(WINDOW + 8, 6);
    assert_eq!(introspector.load(WINDOW + 8), 6);
}
