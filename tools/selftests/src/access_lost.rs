// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Single steps whose end the CPU does not tell: the guest runs on, but not with more rights than it
//! has.

use std::fs;

use iced_x86::code_asm::*;
use kvmi_abi::access::W;

use crate::{
    access_tool::{emit, with_code, TARGET},
    harness::{skip, test, Ctx, Test},
    tool::Tool,
    vcpu::{Exit, Vcpu},
    vm::TestVm,
};

const AREA: &str = "access_lost";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(lost_trap_is_noticed_at_the_next_exit),
    test!(guest_without_exits_of_its_own_is_stopped_all_the_same),
    test!(guest_never_sees_the_flag_of_a_lost_trap),
];

/// Has KVM lose a trap; there is none to lose any more when this is dropped.
struct Loss {
    before: u64,
}

impl Loss {
    /// For tests alone, `CONFIG_KVM_INTROSPECTION_TEST`: how many traps are to be lost.
    const TO_LOSE: &'static str = "/sys/module/kvm/parameters/introspection_lose_traps";
    /// How many have been noticed.
    const NOTICED: &'static str = "/sys/kernel/debug/kvm/introspection_steps_lost";

    fn of_next_trap() -> Self {
        let before = number(Self::NOTICED).expect("KVM has statistics");
        if fs::write(Self::TO_LOSE, "1").is_err() {
            skip("this kernel was built without KVM_INTROSPECTION_TEST");
        }
        Self { before }
    }

    /// How many were lost since, and have been noticed.
    fn noticed(&self) -> u64 {
        assert_eq!(number(Self::TO_LOSE), Some(0), "it has not been lost");
        number(Self::NOTICED).expect("KVM has statistics") - self.before
    }
}

impl Drop for Loss {
    fn drop(&mut self) {
        // Best effort: the test is over.
        let _ = fs::write(Self::TO_LOSE, "0");
    }
}

fn number(file: &str) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Runs code that begins with a write to [`TARGET`], which is permitted and whose trap gets lost.
#[track_caller]
fn losing_a_trap(write: impl FnOnce(&mut CodeAssembler)) -> (TestVm, Vcpu, Tool, Loss) {
    let (vm, mut vcpu) = with_code(write);
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    let event = tool.expect_pf(0, TARGET, W);
    let loss = Loss::of_next_trap();
    tool.resume(&event);
    (vm, vcpu, tool, loss)
}

fn lost_trap_is_noticed_at_the_next_exit(_: &Ctx) {
    let (vm, mut vcpu, mut tool, loss) = losing_a_trap(|code| {
        emit(code.mov(byte_ptr(TARGET), 1));
        emit(code.out(0x11, al));
        emit(code.mov(byte_ptr(TARGET), 2));
    });
    assert_eq!(vcpu.exit(), Exit::Out(0x11));
    assert_eq!(loss.noticed(), 1);
    vcpu.run();
    let event = tool.expect_pf(0, TARGET, W);
    assert_eq!(vm.memory.read(TARGET, 1), [1]);
    tool.resume(&event);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    assert_eq!(vm.memory.read(TARGET, 1), [2]);
    assert_eq!(loss.noticed(), 1, "and this one was not lost");
}

fn guest_without_exits_of_its_own_is_stopped_all_the_same(_: &Ctx) {
    // Far longer than until the host's next timer interrupt.
    const ROUNDS: u64 = 20_000_000;
    let (_vm, mut vcpu, mut tool, loss) = losing_a_trap(|code| {
        let mut again = code.create_label();
        emit(code.mov(byte_ptr(TARGET), 1));
        emit(code.mov(rcx, ROUNDS));
        emit(code.set_label(&mut again));
        emit(code.dec(rcx));
        emit(code.jne(again));
        emit(code.mov(byte_ptr(TARGET), 2));
    });
    let event = tool.expect_pf(0, TARGET, W);
    assert_eq!(loss.noticed(), 1);
    tool.resume(&event);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
}

fn guest_never_sees_the_flag_of_a_lost_trap(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(byte_ptr(TARGET), 1));
        emit(code.pushfq());
        emit(code.pop(rax));
        emit(code.mov(rdx, dr6));
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    let loss = Loss::of_next_trap();
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10));
    assert_eq!(loss.noticed(), 1);
    let regs = vcpu.regs();
    assert_eq!((regs.rax & 0x100, regs.rdx & 0x4000), (0, 0));
    assert_eq!(vm.record(0).count, 0, "exceptions of the guest");
    tool.settle();
}
