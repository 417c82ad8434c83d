// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page access: what the tool may decide about an access, and when restrictions end.

use iced_x86::code_asm::{al, byte_ptr};
use kvmi_abi::{
    access::{PageAccess, R, W, X},
    id::VCPU_EVENT,
    Action, Command,
};

use crate::{
    access::writers,
    access_tool::{access_request, add_code, emit, expect_accesses, with_code, CODE, TARGET},
    guest::counter,
    harness::{test, Ctx, Test},
    tool::Tool,
    vcpu::{Exit, Vcpu},
    vcpu_tool::Paused,
    vm::{Guest, TestVm, PAGE},
};

const AREA: &str = "access_end";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(retry_runs_the_instruction_again),
    test!(crash_ends_kvm_run),
    test!(set_registers_takes_the_guest_elsewhere),
    test!(without_events_accesses_are_permitted),
    test!(granted_again_is_not_reported),
    test!(unhook_lifts_all_restrictions),
    test!(disconnect_lifts_all_restrictions),
    test!(restriction_survives_its_memory_slot),
];

/// A guest that is about to write to [`TARGET`], and then does so again.
fn first_of_two_writes() -> (TestVm, Vcpu, Tool, Paused) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(byte_ptr(TARGET), 1));
        emit(code.mov(byte_ptr(TARGET), 2));
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    let first = tool.expect_pf(0, TARGET, W);
    (vm, vcpu, tool, first)
}

fn retry_runs_the_instruction_again(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| emit(code.mov(byte_ptr(TARGET), 1)));
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    for _ in 0..3 {
        let event = tool.expect_pf(0, TARGET, W);
        assert_eq!(event.arch.regs.rip, CODE);
        tool.answer(&event, Action::Retry);
    }
    let event = tool.expect_pf(0, TARGET, W);
    assert_eq!(vm.memory.read(TARGET, 1), [0]);
    tool.deny(TARGET, 0);
    tool.answer(&event, Action::Retry);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    assert_eq!(vm.memory.read(TARGET, 1), [1]);
}

fn crash_ends_kvm_run(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| emit(code.mov(byte_ptr(TARGET), 1)));
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    let event = tool.expect_pf(0, TARGET, W);
    tool.answer(&event, Action::Crash);
    assert_eq!(vcpu.exit(), Exit::Shutdown);
    assert_eq!(vm.memory.read(TARGET, 1), [0]);
}

fn set_registers_takes_the_guest_elsewhere(_: &Ctx) {
    let (vm, mut vcpu, mut tool, first) = first_of_two_writes();
    let mut regs = first.arch.regs;
    // mov $imm8, disp32
    regs.rip += 8;
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    // What was permitted was another instruction.
    tool.resume(&first);
    let second = tool.expect_pf(0, TARGET, W);
    assert_eq!(second.arch.regs.rip, regs.rip);
    assert_eq!(vm.memory.read(TARGET, 1), [0]);
    tool.resume(&second);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    assert_eq!(vm.memory.read(TARGET, 1), [2]);
}

fn without_events_accesses_are_permitted(_: &Ctx) {
    let (vm, mut vcpu) = with_code(writers);
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10));
    tool.settle();
    assert_eq!(vm.memory.read(TARGET + 64, 1), [1]);
}

fn granted_again_is_not_reported(_: &Ctx) {
    let (_vm, mut vcpu, mut tool, event) = first_of_two_writes();
    tool.deny(TARGET, 0);
    tool.resume(&event);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    tool.settle();
}

/// Protects what two vCPUs count in, while they do; returns when one of them waits for a reply.
#[track_caller]
fn protect_counters(tool: &mut Tool) {
    for vcpu in [0, 1] {
        tool.want_pf(vcpu);
    }
    let page = PageAccess::new(counter(0), R | X);
    tool.send(Command::VmSetPageAccess.id(), &access_request(&[page]));
    // Events may be faster than the reply.
    while tool.next().header.id != VCPU_EVENT {}
}

fn unhook_lifts_all_restrictions(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 2);
    let mut tool = vm.hook_allowing_all();
    protect_counters(&mut tool);
    vm.unhook();
    vm.expect_progress();
    vm.expect_usable();
}

fn disconnect_lifts_all_restrictions(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 2);
    let mut tool = vm.hook_allowing_all();
    protect_counters(&mut tool);
    drop(tool);
    vm.expect_progress();
    vm.unhook();
    vm.expect_usable();
}

fn restriction_survives_its_memory_slot(_: &Ctx) {
    const GPA: u64 = 0x1000_0000;
    let memory = crate::memory::Memory::new(4 * PAGE);
    let mut vm = TestVm::new();
    vm.add_slot(1, GPA, &memory);
    let mut vcpu = add_code(&mut vm, CODE, |code| {
        for value in 1..=3 {
            emit(code.mov(byte_ptr(GPA + PAGE as u64), value));
            emit(code.out(0x10, al));
        }
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(GPA + PAGE as u64, W);
    for value in 1..=3 {
        expect_accesses(&mut tool, &mut vcpu, &[(GPA + PAGE as u64, W)]);
        assert_eq!(memory.read(PAGE as u64, 1), [value]);
        vm.remove_slot(1);
        vm.add_slot(1, GPA, &memory);
    }
}
