// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Pages of one VM in another one: what is seen there, and when it ends.

use std::time::{Duration, Instant};

use kvmi_abi::{
    access::{ALL, W},
    hypercall::{MapEntry, MEM_MAP, MEM_MAP_MANY, MEM_UNMAP, MEM_UNMAP_MANY},
    token::MapToken,
    Command, KvmiError,
};
use rustix::{io::Errno, thread::CapabilitySet};

use crate::{
    access_tool::{NEXT, PLAIN, TARGET},
    harness::{test, Ctx, Test},
    mapping_tool::{number, Introspector, ARRAY, TOKEN},
    memory::Memory,
    sys,
    tool::Tool,
    util::wait_for,
    vm::{TestVm, MEMORY, PAGE},
};

const AREA: &str = "mapping";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(both_guests_see_what_either_of_them_writes),
    test!(own_page_comes_back_as_it_was),
    test!(page_that_is_read_only_cannot_be_written_to),
    test!(many_pages_are_mapped_by_one_token_or_none),
    test!(token_is_good_for_one_mapping),
    test!(token_that_was_of_no_use_can_be_presented_again),
    test!(there_are_eight_tokens_at_a_time),
    test!(tokens_expire_after_three_seconds),
    test!(tokens_end_with_their_session),
    test!(token_may_cross_pages),
    test!(errors_of_hypercalls_are_those_of_the_protocol),
    test!(only_a_kernel_may_map),
    test!(only_an_introspector_may_map),
    test!(introspector_is_not_introspected),
    test!(mapping_follows_the_memory_of_the_target),
    test!(mappings_end_with_the_session),
    test!(mappings_end_with_the_target),
    test!(mappings_end_with_the_introspector),
    test!(mappings_end_with_a_memory_slot_of_either_vm),
    test!(writes_are_in_the_dirty_log_of_the_target),
    test!(restrictions_of_the_target_are_not_the_introspectors),
];

/// The tool's view of the target; the third page of it is what tests map.
const PAGE_OF_TARGET: u64 = NEXT;
/// Which page of the introspector stands for it.
const WINDOW: u64 = TARGET;

const EPERM: i64 = -1;
const ENOENT: i64 = -2;
const EFAULT: i64 = -14;
const EINVAL: i64 = -22;
const E2BIG: i64 = -7;
const EALREADY: i64 = -114;
const ENOSYS: i64 = -1000;

/// A target whose pages begin with their addresses, its tool, and an introspector whose pages
/// begin with the complement of theirs.
#[track_caller]
fn scene() -> (TestVm, Tool, Introspector) {
    let target = TestVm::new();
    scene_with(target)
}

#[track_caller]
fn scene_with(target: TestVm) -> (TestVm, Tool, Introspector) {
    let introspector = Introspector::new();
    for page in 0..4 {
        let gpa = TARGET + page * PAGE as u64;
        target.memory.write(gpa, &gpa.to_le_bytes());
        introspector.vm.memory.write(gpa, &(!gpa).to_le_bytes());
    }
    let tool = target.hook_allowing_all();
    (target, tool, introspector)
}

#[track_caller]
fn map(tool: &mut Tool, introspector: &mut Introspector) {
    let token = tool.map_token();
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), 0);
    assert_eq!(introspector.load(WINDOW), PAGE_OF_TARGET);
}

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
        let token = tool.map_token();
        assert_eq!(introspector.map_many(&token, &entries), 0);
        for nth in [0, 1, 31, 32, 100, 255] {
            assert_eq!(introspector.load(gpa(nth)), gpa(255 - nth), "page {nth}");
        }
        assert_eq!(introspector.unmap_many(&gpas), 256);
        assert_eq!(introspector.load(gpa(7)), 0);
        assert_eq!(introspector.unmap_many(&gpas), ENOENT);
    }
    // One that cannot be mapped, or is named twice, and none is.
    let token = tool.map_token();
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
        assert_eq!(introspector.map_many(&token, &entries), error);
        for nth in [0, 3, 199, 255] {
            assert_eq!(introspector.load(gpa(nth)), 0, "page {nth}");
        }
        entries[200] = right;
    }
    assert_eq!(introspector.map_many(&token, &entries[..5]), 0);
    // What comes behind a page that is not mapped stays so.
    let some = [gpa(0), gpa(1), gpa(9), gpa(2)];
    assert_eq!(introspector.unmap_many(&some), 2);
    assert_eq!(introspector.load(gpa(1)), 0);
    assert_eq!(introspector.load(gpa(2)), gpa(253));
}

fn token_is_good_for_one_mapping(_: &Ctx) {
    let (_target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), 0);
    let next = WINDOW + PAGE as u64;
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, next), ENOENT);
    let mut wrong = tool.map_token();
    wrong.bytes[31] ^= 1;
    for unknown in [wrong, MapToken::default()] {
        assert_eq!(introspector.map(&unknown, PAGE_OF_TARGET, next), ENOENT);
    }
    assert_eq!(introspector.load(next), !next);
}

fn token_that_was_of_no_use_can_be_presented_again(_: &Ctx) {
    let (_target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    assert_eq!(introspector.map(&token, 0x4000_0000, WINDOW), ENOENT);
    assert_eq!(
        introspector.map(&token, PAGE_OF_TARGET, 0x4000_0000),
        EFAULT
    );
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), 0);
    let token = tool.map_token();
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), EALREADY);
    assert_eq!(
        introspector.map(&token, PAGE_OF_TARGET, WINDOW + PAGE as u64),
        0
    );
}

fn there_are_eight_tokens_at_a_time(_: &Ctx) {
    let (_target, mut tool, mut introspector) = scene();
    let tokens: Vec<_> = (0..8).map(|_| tool.map_token()).collect();
    assert!(tool.try_map_token(0).is_err_and(|e| e == KvmiError::Again));
    assert_eq!(introspector.map(&tokens[3], PAGE_OF_TARGET, WINDOW), 0);
    tool.map_token();
    assert!(tool.try_map_token(0).is_err_and(|e| e == KvmiError::Again));
    for (nth, token) in tokens.iter().enumerate() {
        let distinct = tokens.iter().filter(|other| other.bytes == token.bytes);
        assert_eq!(distinct.count(), 1, "token {nth}");
    }
    let padded = tool.call(Command::VmGetMapToken, &[0, 0, 0, 0, 1]);
    assert_eq!(padded, Err(KvmiError::Inval));
    assert!(tool.try_map_token(2).is_err_and(|e| e == KvmiError::Inval));
}

fn tokens_expire_after_three_seconds(_: &Ctx) {
    const LIFETIME: Duration = Duration::from_secs(3);
    const MARGIN: Duration = Duration::from_millis(100);
    let (_target, mut tool, mut introspector) = scene();
    let before = Instant::now();
    let early = tool.map_token();
    let late = tool.map_token();
    let others: Vec<_> = (0..6).map(|_| tool.map_token()).collect();
    let after = Instant::now();
    assert_eq!(others.len(), 6);
    // Nobody presents them, and nobody asks for others: a place is free when it is time.
    std::thread::sleep((before + LIFETIME - MARGIN).saturating_duration_since(Instant::now()));
    if before.elapsed() < LIFETIME {
        assert_eq!(introspector.map(&early, PAGE_OF_TARGET, WINDOW), 0);
    }
    std::thread::sleep((after + LIFETIME + MARGIN).saturating_duration_since(Instant::now()));
    let next = WINDOW + PAGE as u64;
    assert_eq!(introspector.map(&late, PAGE_OF_TARGET, next), ENOENT);
    for _ in 0..8 {
        tool.map_token();
    }
}

fn tokens_end_with_their_session(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    target.unhook();
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), ENOENT);
    let mut tool = target.hook_allowing_all();
    let token = tool.map_token();
    drop(tool);
    wait_for("the token is gone", || {
        introspector.map(&token, PAGE_OF_TARGET, 0x4000_0000) == ENOENT
    });
    target.unhook();
}

fn token_may_cross_pages(_: &Ctx) {
    let (_target, mut tool, mut introspector) = scene();
    for offset in [1, 31, 32] {
        let token = tool.map_token();
        let gva = PLAIN + 2 * PAGE as u64 - offset;
        introspector.vm.memory.write(gva, &token.bytes);
        let mapped = introspector.call(MEM_MAP, [gva, PAGE_OF_TARGET, WINDOW]);
        assert_eq!(mapped, 0, "{offset} bytes before the end");
        assert_eq!(introspector.unmap(WINDOW), 0);
    }
}

fn errors_of_hypercalls_are_those_of_the_protocol(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    introspector.vm.memory.write(TOKEN, &token.bytes);
    let unmapped = 0x7fff_0000_0000;
    for (nr, args, error) in [
        (MEM_MAP, [unmapped, PAGE_OF_TARGET, WINDOW], ENOENT),
        (MEM_MAP, [TOKEN, PAGE_OF_TARGET + 1, WINDOW], EINVAL),
        (MEM_MAP, [TOKEN, PAGE_OF_TARGET, WINDOW + 0x800], EINVAL),
        (MEM_MAP, [TOKEN, u64::MAX - 4095, WINDOW], ENOENT),
        (MEM_MAP, [TOKEN, PAGE_OF_TARGET, MEMORY as u64], EFAULT),
        (MEM_UNMAP, [WINDOW, 0, 0], ENOENT),
        (MEM_UNMAP, [WINDOW + 1, 0, 0], EINVAL),
        (MEM_UNMAP, [u64::MAX - 4095, 0, 0], ENOENT),
        (MEM_MAP_MANY, [TOKEN, ARRAY, 0], EINVAL),
        (MEM_MAP_MANY, [TOKEN, ARRAY, 257], E2BIG),
        (MEM_MAP_MANY, [TOKEN, ARRAY + 8, 1], EINVAL),
        (MEM_MAP_MANY, [TOKEN, 0x4000_0000, 1], ENOENT),
        (MEM_UNMAP_MANY, [ARRAY, 0, 0], EINVAL),
        (MEM_UNMAP_MANY, [ARRAY, 513, 0], E2BIG),
        (34, [0; 3], ENOSYS),
        (37, [0; 3], ENOSYS),
    ] {
        assert_eq!(introspector.call(nr, args), error, "{nr} {args:x?}");
    }
    let rom = Memory::new(PAGE);
    target.add_rom(1, 0x100_0000, &rom);
    introspector.vm.add_rom(1, 0x100_0000, &rom);
    assert_eq!(introspector.map(&token, 0x100_0000, WINDOW), EPERM);
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, 0x100_0000), EFAULT);
    // To read it is fine.
    let token = tool.read_only_token();
    assert_eq!(introspector.map(&token, 0x100_0000, WINDOW), 0);
}

fn only_a_kernel_may_map(_: &Ctx) {
    let (_target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    introspector.vm.memory.write(TOKEN, &token.bytes);
    let result = introspector.call_from_user_mode(MEM_MAP, [TOKEN, PAGE_OF_TARGET, WINDOW]);
    assert_eq!(result, EPERM);
    assert_eq!(introspector.load(WINDOW), !WINDOW);
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), 0);
}

fn only_an_introspector_may_map(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    let mut other = Introspector::ordinary(TestVm::new());
    assert_eq!(other.map(&token, PAGE_OF_TARGET, WINDOW), ENOSYS);
    assert_eq!(introspector.appoint(0), Ok(()));
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), ENOSYS);
    assert_eq!(introspector.appoint(0), Err(Errno::NOENT));
    assert_eq!(introspector.appoint(2), Err(Errno::INVAL));
    assert_eq!(introspector.appoint(1), Ok(()));
    assert_eq!(introspector.appoint(1), Err(Errno::EXIST));
    // Not for those who could not introspect themselves.
    let dev = sys::open_dev();
    let vm_fd = other.vm.raw_fd();
    let appoint = || sys::introspector(&dev, vm_fd, 1);
    let refused = sys::without_capability(CapabilitySet::SYS_ADMIN, appoint);
    assert_eq!(refused, Err(Errno::PERM));
    // Nor has the target such a call.
    drop(tool);
    target.unhook();
}

fn introspector_is_not_introspected(_: &Ctx) {
    let (target, _tool, introspector) = scene();
    let tool = Tool::new();
    let refused = sys::attach(sys::open_dev(), introspector.vm.raw_fd(), tool.vmm_fd());
    assert_eq!(refused, Err(Errno::EXIST));
    let refused = sys::introspector(sys::open_dev(), target.raw_fd(), 1);
    assert_eq!(refused, Err(Errno::EXIST));
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

fn mappings_end_with_a_memory_slot_of_either_vm(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    let base = 0x100_0000;
    let memory = Memory::new(PAGE);
    memory.write(0, &[1; 8]);
    target.add_slot(1, base, &memory);
    let token = tool.map_token();
    assert_eq!(introspector.map(&token, base, WINDOW), 0);
    assert_eq!(introspector.load(WINDOW), 0x0101_0101_0101_0101);
    target.remove_slot(1);
    assert_eq!(introspector.load(WINDOW), !WINDOW);
    assert_eq!(introspector.unmap(WINDOW), ENOENT);

    let own = Memory::new(PAGE);
    introspector.vm.add_slot(1, base, &own);
    let token = tool.map_token();
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, base), 0);
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
