// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page access and the host's memory management: what backs a restricted page may be merged, split,
//! moved and taken away; and there may be many restricted pages.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use iced_x86::code_asm::*;
use kvmi_abi::access::{PageAccess, ALL, R, W, X};

use crate::{
    access_stress::{expect_exact, hammering_in, Guard, WRITES},
    access_tool::{add_code, emit, expect_accesses, CODE, NEXT, TARGET},
    harness::{note, skip, test, Ctx, Test},
    memory::Memory,
    util::{expect_swap, wait_for},
    vm::{TestVm, MEMORY, PAGE},
};

const AREA: &str = "access_memory";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(events_stay_exact_while_the_memory_is_merged_collapsed_moved_and_swapped).long(),
    test!(restriction_survives_the_loss_of_its_page),
    test!(restriction_survives_swapping),
    test!(a_million_pages_can_be_restricted).long(),
];

/// A setting of KSM, which is as before when this is dropped.
struct Setting {
    file: &'static str,
    before: String,
}

impl Setting {
    fn set(file: &'static str, value: &str) -> Self {
        let Ok(before) = fs::read_to_string(file) else {
            skip("this kernel does not merge pages (KSM)");
        };
        fs::write(file, value).expect("a setting of KSM can be changed");
        Self { file, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // Best effort: the test is over.
        let _ = fs::write(self.file, &self.before);
    }
}

/// Has the host collapse, move, swap out and split memory until told otherwise; returns how often
/// there was a huge page.
pub fn disturb(memory: &Memory, over: &AtomicBool) -> u32 {
    let mut collapsed = 0;
    while !over.load(Ordering::Relaxed) {
        // Whether it works depends on what the others are doing just now.
        collapsed += u32::from(memory.collapse());
        let _ = fs::write("/proc/sys/vm/compact_memory", "1");
        memory.swap_out();
        memory.split_up();
    }
    collapsed
}

fn events_stay_exact_while_the_memory_is_merged_collapsed_moved_and_swapped(ctx: &Ctx) {
    let _settings = [
        ("/sys/kernel/mm/ksm/sleep_millisecs", "0"),
        ("/sys/kernel/mm/ksm/pages_to_scan", "4096"),
        ("/sys/kernel/mm/ksm/run", "1"),
    ]
    .map(|(file, value)| Setting::set(file, value));
    let memory = Memory::huge(MEMORY);
    memory.mergeable();
    let vcpus = 2;
    let rounds = ctx.rounds(100) as u64;
    let (vm, mut vcpus) = hammering_in(TestVm::with_memory(memory, 0), vcpus, rounds);
    let mut guard = Guard::start(&vm, &mut vcpus);
    let over = AtomicBool::new(false);
    let done = thread::scope(|scope| {
        let disturb = scope.spawn(|| disturb(&memory, &over));
        guard.permit(WRITES * rounds * vcpus.len() as u64);
        expect_exact(&vm, &mut vcpus, rounds);
        over.store(true, Ordering::Relaxed);
        disturb.join().expect("it does not fail")
    });
    note!("{done} times there was a huge page");
    guard.tool.settle();
}

fn restriction_survives_the_loss_of_its_page(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = add_code(&mut vm, CODE, |code| {
        for value in 1..=3 {
            emit(code.mov(byte_ptr(TARGET), value));
            emit(code.out(0x10, al));
        }
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    for value in 1..=3 {
        expect_accesses(&mut tool, &mut vcpu, &[(TARGET, W)]);
        assert_eq!(vm.memory.read(TARGET, 1), [value]);
        vm.memory.discard(TARGET as usize, PAGE);
        assert_eq!(vm.memory.read(TARGET, 1), [0]);
    }
}

fn restriction_survives_swapping(_: &Ctx) {
    expect_swap();
    let mut vm = TestVm::new();
    let mut vcpu = add_code(&mut vm, CODE, |code| {
        for _ in 1..=3 {
            emit(code.inc(byte_ptr(TARGET)));
            emit(code.inc(byte_ptr(NEXT)));
            emit(code.out(0x10, al));
        }
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    for _ in 1..=3 {
        expect_accesses(&mut tool, &mut vcpu, &[(TARGET, W)]);
        for page in [TARGET, NEXT] {
            wait_for("the page is swapped out", || {
                vm.memory.swap_out();
                vm.memory.is_swapped_out(page)
            });
        }
    }
    assert_eq!(vm.memory.read(TARGET, 1), [3]);
    assert_eq!(vm.memory.read(NEXT, 1), [3]);
}

fn a_million_pages_can_be_restricted(ctx: &Ctx) {
    // Beyond what the guest has mapped; nothing is ever there.
    const GPA: u64 = 0x10_0000_0000;
    const AT_ONCE: usize = 500;
    let count = ctx.rounds(1_000_000);
    let mut vm = TestVm::new();
    vm.add_slot(1, GPA, &Memory::new(count * PAGE));
    let mut vcpu = add_code(&mut vm, CODE, |code| emit(code.mov(byte_ptr(TARGET), 1)));
    let mut tool = vm.hook_allowing_all();
    let mut set_all = |access| {
        let pages: Vec<_> = (0..count as u64)
            .map(|nth| PageAccess::new(GPA + nth * PAGE as u64, access))
            .collect();
        for batch in pages.chunks(AT_ONCE) {
            assert_eq!(tool.set_access(batch), Ok(()));
        }
    };
    let before = nodes();
    set_all(R | X);
    let bytes = nodes().saturating_sub(before);
    note!("{bytes} bytes for {count} pages");
    // 9 of the tree's nodes; the rest is for what else has such trees meanwhile.
    assert!(bytes <= 16 * count as u64 + (1 << 20), "{bytes} bytes");
    set_all(ALL);
    let left = nodes().saturating_sub(before);
    assert!(left <= 1 << 20, "{left} bytes are left");
    tool.deny(TARGET, W);
    expect_accesses(&mut tool, &mut vcpu, &[(TARGET, W)]);
}

/// Bytes that the kernel has for nodes of radix trees.
fn nodes() -> u64 {
    tiny_vm::tree_bytes().unwrap_or_else(|| skip("this kernel does not tell the size of its trees"))
}
