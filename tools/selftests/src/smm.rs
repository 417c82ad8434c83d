// SPDX-License-Identifier: GPL-2.0 OR MIT

//! vCPUs in system management mode.

use kvmi_abi::Action;

use crate::{
    guest::Mode,
    harness::{skip, test, Ctx, Test},
    tool::Tool,
    util::wait_for,
    vcpu::Vcpu,
    vm::{Guest, TestVm},
};

const AREA: &str = "smm";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(smm_looks_like_16_bit_code),
    test!(registers_set_in_smm_are_used_there),
    test!(unhook_in_smm_changes_nothing),
];

/// The first slot of the address space of SMM.
const SMM_SPACE: u32 = 1 << 16;
const SMBASE: u64 = 0x3_0000;
/// Where the processor begins in SMM, relative to that.
const ENTRY: u64 = 0x8000;
/// `sti; 1: jmp 1b; rsm`: with interrupts off, the guest would keep those of the host from Bochs.
const CODE: [u8; 5] = [0xfb, 0xeb, 0xfe, 0x0f, 0xaa];
const SPIN: u64 = ENTRY + 1;
const RSM: u64 = ENTRY + 3;

/// A VM with a vCPU that was in this mode, and is in SMM now.
#[track_caller]
fn vm_in_smm(guest: Guest) -> (TestVm, Vcpu, Tool) {
    let mut vm = TestVm::new();
    vm.memory.write(SMBASE + ENTRY, &CODE);
    // In SMM a vCPU has an address space of its own: here, it has the same memory.
    vm.add_slot(SMM_SPACE, 0, &vm.memory);
    let mut vcpu = vm.control(guest);
    let mut tool = vm.hook_allowing_all();
    if vcpu.with(|fd| fd.smi()).is_err() {
        skip("KVM has no SMM");
    }
    vcpu.run();
    wait_for("the vCPU is in SMM", || tool.regs(0).rip == SPIN);
    (vm, vcpu, tool)
}

/// Lets the vCPU return from SMM.
#[track_caller]
fn leave(tool: &mut Tool) {
    let paused = tool.pause(0);
    let mut regs = paused.arch.regs;
    regs.rip = RSM;
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    tool.answer(&paused, Action::Continue);
}

fn smm_looks_like_16_bit_code(_: &Ctx) {
    for (mode, size) in Mode::ALL {
        let (_vm, vcpu, mut tool) = vm_in_smm(Guest::Spin(mode));
        let (reply, _) = tool.registers(0, &[]).expect("registers can be read");
        assert_eq!(reply.mode, 2, "{mode:?}");
        assert_eq!(reply.sregs.cs.base, SMBASE);
        assert_eq!((reply.sregs.cr0 & 0x8000_0001, reply.sregs.efer), (0, 0));
        let paused = tool.pause(0);
        assert_eq!(paused.arch.mode, 2);
        assert_eq!(paused.arch.regs, reply.regs);
        tool.resume(&paused);
        leave(&mut tool);
        wait_for("the vCPU is back", || {
            let (reply, _) = tool.registers(0, &[]).expect("registers can be read");
            reply.mode == size.into() && reply.regs.rip == crate::guest::SPIN_CODE
        });
        vcpu.expect_running();
    }
}

fn registers_set_in_smm_are_used_there(_: &Ctx) {
    let (vm, _vcpu, mut tool) = vm_in_smm(Guest::Count64);
    assert_eq!(vm.count(0), 0, "the guest has run before");
    let paused = tool.pause(0);
    let mut regs = paused.arch.regs;
    regs.rbp = 0x1234;
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    tool.resume(&paused);
    let paused = tool.pause(0);
    assert_eq!((paused.arch.regs, paused.arch.mode), (regs, 2));
    tool.resume(&paused);
    leave(&mut tool);
    vm.expect_progress_of(0);
    // They are not those of the guest outside.
    assert_ne!(tool.regs(0).rbp, 0x1234);
}

fn unhook_in_smm_changes_nothing(_: &Ctx) {
    let (vm, vcpu, mut tool) = vm_in_smm(Guest::Count64);
    tool.pause(0);
    vm.unhook();
    tool.expect_closed();
    let mut tool = vm.hook_allowing_all();
    let (reply, _) = tool.registers(0, &[]).expect("registers can be read");
    assert_eq!((reply.mode, reply.regs.rip), (2, SPIN));
    leave(&mut tool);
    vm.expect_progress_of(0);
    vcpu.expect_running();
}
