// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page access and what KVM itself writes to guest memory, at addresses that the guest chooses: not
//! to a page that the guest may not write.

use iced_x86::code_asm::*;
use kvmi_abi::access::{ALL, W, X};

use crate::{
    access_tool::{emit, with_code, NEXT, TARGET},
    harness::{test, Ctx, Test},
    vcpu::{Exit, Vcpu},
    vm::TestVm,
};

const AREA: &str = "access_pv";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(time_is_not_written_to_a_protected_page),
    test!(time_is_written_once_the_page_is_granted),
    test!(page_in_use_for_the_time_can_be_protected),
];

/// `MSR_KVM_WALL_CLOCK_NEW`: KVM writes the time of boot there, at once.
const WALL_CLOCK: u32 = 0x4b56_4d00;
/// `MSR_KVM_SYSTEM_TIME_NEW`: KVM keeps the time up to date there.
const SYSTEM_TIME: u32 = 0x4b56_4d01;
/// `MSR_KVM_STEAL_TIME`: KVM keeps the time stolen up to date there.
const STEAL_TIME: u32 = 0x4b56_4d03;
/// The bit of most of them that switches it on.
const ENABLED: u64 = 1;
/// The tables are aligned to this, and shorter.
const TABLE: u64 = 64;

/// WRMSR
fn write_msr(code: &mut CodeAssembler, msr: u32, value: u64) {
    emit(code.mov(ecx, msr));
    emit(code.mov(eax, value as u32));
    emit(code.mov(edx, (value >> 32) as u32));
    emit(code.wrmsr());
}

/// Tells KVM to write to [`TARGET`] and [`NEXT`].
fn ask_for_time(code: &mut CodeAssembler) {
    write_msr(code, WALL_CLOCK, TARGET);
    write_msr(code, SYSTEM_TIME, (TARGET + TABLE) | ENABLED);
    write_msr(code, STEAL_TIME, NEXT | ENABLED);
    // More than one entry of the guest.
    emit(code.out(0x11, al));
}

/// What KVM has written: the wall clock, the system time, the time stolen.
fn written(vm: &TestVm) -> [bool; 3] {
    [TARGET, TARGET + TABLE, NEXT].map(|table| vm.memory.read(table, 32) != [0; 32])
}

#[track_caller]
fn run_to_the_end(vcpu: &mut Vcpu) {
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x11));
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10));
}

fn time_is_not_written_to_a_protected_page(_: &Ctx) {
    // With other accesses denied it is written.
    for (denied, writes) in [(X, true), (W, false), (ALL, false)] {
        let (vm, mut vcpu) = with_code(ask_for_time);
        let mut tool = vm.hook_allowing_all();
        tool.deny(TARGET, denied);
        tool.deny(NEXT, denied);
        run_to_the_end(&mut vcpu);
        assert_eq!(written(&vm), [writes; 3], "denied {denied}");
        // And nobody is asked.
        tool.settle();
    }
}

fn time_is_written_once_the_page_is_granted(_: &Ctx) {
    for unhook in [false, true] {
        let (vm, mut vcpu) = with_code(|code| {
            ask_for_time(code);
            emit(code.out(0x11, al));
        });
        let mut tool = vm.hook_allowing_all();
        tool.deny(TARGET, W);
        tool.deny(NEXT, W);
        assert_eq!(vcpu.run_until_exit(), Exit::Out(0x11));
        assert_eq!(written(&vm), [false; 3]);
        if unhook {
            vm.unhook();
        } else {
            tool.deny(TARGET, 0);
            tool.deny(NEXT, 0);
        }
        run_to_the_end(&mut vcpu);
        // But for the wall clock, which is written once, when the guest asks for it.
        assert_eq!(written(&vm), [false, true, true], "unhooked: {unhook}");
    }
}

fn page_in_use_for_the_time_can_be_protected(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        ask_for_time(code);
        // KVM brings the page up to date for each of these.
        write_msr(code, SYSTEM_TIME, (TARGET + TABLE) | ENABLED);
        write_msr(code, STEAL_TIME, NEXT | ENABLED);
    });
    let mut tool = vm.hook_allowing_all();
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x11));
    assert_eq!(written(&vm), [true; 3]);
    tool.deny(TARGET, W);
    tool.deny(NEXT, W);
    vm.memory.fill(TARGET, 128, 0);
    vm.memory.fill(NEXT, 64, 0);
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10));
    assert_eq!(written(&vm), [false; 3]);
    tool.settle();
}
