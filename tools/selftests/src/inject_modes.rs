// SPDX-License-Identifier: GPL-2.0 OR MIT

//! INJECT_EXCEPTION outside of 64-bit code: what the handlers of each mode see.

use kvmi_abi::{vcpu::TrapEvent, Command, Event, KvmiError};
use zerocopy::IntoBytes as _;

use crate::{
    guest::{has_error_code, Mode, Record, INT3_CODE, INTO_CODE, SPIN_CODE},
    harness::{note, test, Ctx, Test},
    inject::{INJECTABLE, NEVER, PF},
    tool::Tool,
    util::wait_for,
    vcpu::Vcpu,
    vcpu_tool::{comparable, exception},
    vm::{Guest, TestVm},
};

const AREA: &str = "inject_modes";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(handlers_of_each_mode_see_each_exception),
    test!(page_fault_needs_paging),
    test!(breakpoint_needs_its_instruction_in_each_mode),
    test!(overflow_needs_its_instruction_and_no_64_bit_code),
    test!(what_is_no_exception_is_invalid_in_each_mode),
];

const BP: u8 = 3;
const OF: u8 = 4;

fn has_paging(mode: Mode) -> bool {
    !matches!(mode, Mode::Real | Mode::Protected16 | Mode::Protected32)
}

/// A VM with one vCPU that runs in this mode.
fn vm_in(mode: Mode) -> (TestVm, Vcpu, Tool) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(mode));
    let tool = vm.hook_allowing_all();
    vcpu.run();
    (vm, vcpu, tool)
}

/// Lets the TRAP event of an exception pass, which must tell this, and waits until the handler has
/// seen it.
#[track_caller]
fn deliver(vm: &TestVm, tool: &mut Tool, expected: (u8, u32, u64)) -> Record {
    let before = vm.record(0).count;
    let event = tool.vcpu_event(0, Event::Trap);
    let TrapEvent {
        nr,
        error_code,
        address,
        ..
    } = event.trap.expect("a TRAP event");
    // There is no rule about the address of others.
    let address = if nr == PF { address } else { 0 };
    assert_eq!((nr, error_code, address), expected);
    assert_eq!(vm.record(0).count, before);
    tool.resume(&event);
    wait_for("the handler runs", || vm.record(0).count == before + 1);
    let record = vm.record(0);
    assert_eq!(record.vector, nr.into());
    assert_eq!(record.error_code, error_code.into());
    record
}

fn handlers_of_each_mode_see_each_exception(_: &Ctx) {
    for (mode, size) in Mode::ALL {
        note!("{mode:?}");
        let (vm, vcpu, mut tool) = vm_in(mode);
        let (before, _) = tool.registers(0, &[]).expect("registers can be read");
        for nr in INJECTABLE {
            if nr == PF && !has_paging(mode) {
                continue;
            }
            // That of a double fault is always 0; in real mode, there are none.
            let error_code = if nr == 8 { 0 } else { 0x18 };
            let address = if nr == PF { 0x12_3456 } else { 0 };
            let injected = tool.inject(0, exception(nr, error_code, address));
            assert_eq!(injected, Ok(()), "exception {nr}");
            let pushed = if has_error_code(nr) && mode != Mode::Real {
                error_code
            } else {
                0
            };
            let record = deliver(&vm, &mut tool, (nr, pushed, address));
            assert_eq!(record.rip, SPIN_CODE, "exception {nr}");
            if nr == PF {
                assert_eq!(record.cr2, address);
            }
        }
        // The handlers have returned to the same code in the same mode.
        wait_for("the handler returns", || tool.regs(0).rip == SPIN_CODE);
        let (after, _) = tool.registers(0, &[]).expect("registers can be read");
        assert_eq!((after.mode, before.mode), (size.into(), size.into()));
        let [before_cs, after_cs] = [&before, &after].map(|reply| comparable(mode, reply.sregs).cs);
        assert_eq!(after_cs, before_cs);
        assert_eq!(after.regs.rsp, before.regs.rsp);
        vcpu.expect_running();
    }
}

fn page_fault_needs_paging(_: &Ctx) {
    for (mode, _) in Mode::ALL {
        note!("{mode:?}");
        let (vm, _vcpu, mut tool) = vm_in(mode);
        let injected = tool.inject(0, exception(PF, 2, 0x1000));
        if has_paging(mode) {
            assert_eq!(injected, Ok(()));
            deliver(&vm, &mut tool, (PF, 2, 0x1000));
        } else {
            assert_eq!(injected, Err(KvmiError::Inval));
        }
    }
}

/// Injects the exception of the instruction at `code`, which has one byte and an endless loop behind
/// it, into a vCPU that is about to execute it.
#[track_caller]
fn inject_at(mode: Mode, code: u64, nr: u8) {
    note!("{mode:?}");
    let (vm, mut vcpu, mut tool) = vm_in(mode);
    assert_eq!(tool.inject(0, exception(nr, 0, 0)), Err(KvmiError::Inval));
    vcpu.stop();
    vcpu.change_regs(|regs| regs.rip = code);
    // The vCPU serves this before it can execute the instruction.
    let id = Command::VcpuInjectException;
    let seq = tool.send_to(0, id, exception(nr, 0, 0).as_bytes());
    tool.settle();
    vcpu.run();
    assert_eq!(tool.reply_to(id.id(), seq), Ok(vec![]));
    let record = deliver(&vm, &mut tool, (nr, 0, 0));
    // It returns behind the instruction, and so it does not happen again.
    assert_eq!(record.rip, code + 1);
    wait_for("the handler returns", || tool.regs(0).rip == code + 1);
    assert_eq!(vm.record(0).count, 1);
}

fn breakpoint_needs_its_instruction_in_each_mode(_: &Ctx) {
    for (mode, _) in Mode::ALL {
        inject_at(mode, INT3_CODE, BP);
    }
}

fn overflow_needs_its_instruction_and_no_64_bit_code(_: &Ctx) {
    for (mode, _) in Mode::ALL.iter().filter(|(mode, _)| *mode != Mode::Long) {
        inject_at(*mode, INTO_CODE, OF);
    }
    // There, the byte is no instruction at all.
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    vcpu.change_regs(|regs| regs.rip = INTO_CODE);
    let mut tool = vm.hook_allowing_all();
    let id = Command::VcpuInjectException;
    let seq = tool.send_to(0, id, exception(OF, 0, 0).as_bytes());
    tool.settle();
    vcpu.run();
    assert_eq!(tool.reply_to(id.id(), seq), Err(KvmiError::Inval));
}

fn what_is_no_exception_is_invalid_in_each_mode(_: &Ctx) {
    for (mode, _) in Mode::ALL {
        note!("{mode:?}");
        let (vm, vcpu, mut tool) = vm_in(mode);
        for nr in NEVER.into_iter().chain([BP, OF, 32, u8::MAX]) {
            let reply = tool.inject(0, exception(nr, 0, 0));
            assert_eq!(reply, Err(KvmiError::Inval), "vector {nr}");
        }
        // Nothing is left over.
        assert_eq!(tool.inject(0, exception(6, 0, 0)), Ok(()));
        deliver(&vm, &mut tool, (6, 0, 0));
        vcpu.expect_running();
    }
}
