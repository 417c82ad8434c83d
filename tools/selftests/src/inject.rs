// SPDX-License-Identifier: GPL-2.0 OR MIT

//! INJECT_EXCEPTION, and what the guest's handlers see of it. For what becomes of it on the way see
//! `trap`.

use kvmi_abi::{
    vcpu::{InjectException, TrapEvent},
    Command, Event, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    guest::{has_error_code, Mode, Record, INT3_CODE, SPIN_CODE},
    harness::{test, Ctx, Test},
    tool::Tool,
    util::wait_for,
    vcpu::Vcpu,
    vcpu_tool::{exception, Paused},
    vm::{Guest, TestVm},
};

const AREA: &str = "inject";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(guest_sees_each_exception),
    test!(page_fault_carries_its_address),
    test!(breakpoint_needs_its_instruction),
    test!(guest_survives_many_exceptions),
    test!(what_is_no_exception_is_invalid),
    test!(every_padding_byte_must_be_zero),
];

/// Invalid opcode.
pub const UD: u8 = 6;
/// General protection.
pub const GP: u8 = 13;
/// Page fault.
pub const PF: u8 = 14;
/// Debug.
pub const DB: u8 = 1;

/// The exceptions that can be injected anywhere, whatever the CPU.
pub const INJECTABLE: [u8; 15] = [0, 1, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19];
/// The ones that never can.
pub const NEVER: [u8; 8] = [2, 9, 15, 20, 28, 29, 30, 31];

/// A VM with one vCPU that runs, with handlers for all exceptions.
pub fn spinning_vm() -> (TestVm, Vcpu, Tool) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    let tool = vm.hook_allowing_all();
    vcpu.run();
    (vm, vcpu, tool)
}

/// Fails the test unless the event tells this exception.
#[track_caller]
pub fn expect_trap(event: &Paused, expected: &InjectException) {
    let trap = event.trap.expect("a TRAP event");
    let mut expected = TrapEvent {
        nr: expected.nr,
        error_code: if has_error_code(expected.nr) {
            expected.error_code
        } else {
            0
        },
        address: if expected.nr == PF {
            expected.address
        } else {
            0
        },
        ..Default::default()
    };
    if expected.nr == DB {
        // There is no rule about it.
        expected.address = trap.address;
    }
    assert_eq!(trap, expected);
}

/// Injects, lets the TRAP event pass, and waits until the handler has seen it.
#[track_caller]
pub fn inject(vm: &TestVm, tool: &mut Tool, vcpu: u16, exception: &InjectException) -> Record {
    let before = vm.record(vcpu.into()).count;
    assert_eq!(tool.inject(vcpu, *exception), Ok(()), "{exception:?}");
    let event = tool.vcpu_event(vcpu, Event::Trap);
    expect_trap(&event, exception);
    assert_eq!(vm.record(vcpu.into()).count, before);
    tool.resume(&event);
    wait_for("the handler runs", || {
        vm.record(vcpu.into()).count == before + 1
    });
    let record = vm.record(vcpu.into());
    assert_eq!(record.vector, exception.nr.into());
    let expected = if has_error_code(exception.nr) {
        exception.error_code
    } else {
        0
    };
    assert_eq!(record.error_code, expected.into(), "{exception:?}");
    record
}

fn guest_sees_each_exception(_: &Ctx) {
    let (vm, vcpu, mut tool) = spinning_vm();
    for nr in INJECTABLE {
        // That of a double fault is always 0; of the others, some have none.
        let error_code = if nr == 8 { 0 } else { 0x18 };
        let record = inject(&vm, &mut tool, 0, &exception(nr, error_code, 0));
        assert_eq!(record.rip, SPIN_CODE, "exception {nr}");
    }
    // The guest goes on where it was.
    assert_eq!(tool.regs(0).rip, SPIN_CODE);
    assert_eq!(vm.record(0).count, INJECTABLE.len() as u64);
    vcpu.expect_running();
}

fn page_fault_carries_its_address(_: &Ctx) {
    let (vm, _vcpu, mut tool) = spinning_vm();
    for (error_code, address) in [
        (0, 0x1234),
        (2, 0xffff_8000_dead_b000),
        (7, 0x7fff_ffff_ffff),
        (0x11, 1),
        (4, 0),
    ] {
        let record = inject(&vm, &mut tool, 0, &exception(PF, error_code, address));
        assert_eq!(record.cr2, address);
    }
    // No other exception touches CR2.
    inject(&vm, &mut tool, 0, &exception(PF, 0, 0x4321));
    let record = inject(&vm, &mut tool, 0, &exception(GP, 0, 0x9999));
    assert_eq!(record.cr2, 0x4321);
}

fn breakpoint_needs_its_instruction(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = spinning_vm();
    let breakpoint = exception(3, 0, 0);
    assert_eq!(tool.inject(0, breakpoint), Err(KvmiError::Inval));
    vcpu.stop();
    vcpu.change_regs(|regs| regs.rip = INT3_CODE);
    // The vCPU serves this before it can execute the instruction.
    let id = Command::VcpuInjectException;
    let seq = tool.send_to(0, id, breakpoint.as_bytes());
    tool.settle();
    vcpu.run();
    assert_eq!(tool.reply_to(id.id(), seq), Ok(vec![]));
    let event = tool.vcpu_event(0, Event::Trap);
    expect_trap(&event, &breakpoint);
    tool.resume(&event);
    wait_for("the handler runs", || vm.record(0).count == 1);
    // It returns behind the instruction, and so it does not happen again.
    wait_for("the handler returns", || tool.regs(0).rip == INT3_CODE + 1);
    let record = vm.record(0);
    assert_eq!((record.vector, record.rip), (3, INT3_CODE + 1));
    assert_eq!(record.count, 1);
}

fn guest_survives_many_exceptions(ctx: &Ctx) {
    let mut rng = ctx.rng();
    let vm = TestVm::running(Guest::Count64, 2);
    let mut tool = vm.hook_allowing_all();
    for _ in 0..ctx.rounds(300) {
        let nr = rng.pick(&INJECTABLE);
        let error_code = if nr == 8 { 0 } else { 2 };
        // For #DB this would be bits of DR6, of which not all may be set.
        let address = if nr == PF { 0x1000 } else { 0 };
        let vcpu = rng.below(2) as u16;
        inject(&vm, &mut tool, vcpu, &exception(nr, error_code, address));
    }
    vm.expect_progress();
}

fn what_is_no_exception_is_invalid(_: &Ctx) {
    let (vm, vcpu, mut tool) = spinning_vm();
    // INTO does not exist in 64-bit code.
    for nr in NEVER.into_iter().chain([4]).chain(32..=u8::MAX) {
        let reply = tool.inject(0, exception(nr, 0, 0));
        assert_eq!(reply, Err(KvmiError::Inval), "vector {nr}");
    }
    // Error codes have 16 bits.
    for error_code in [0x1_0000, 0x8000_0000, u32::MAX] {
        let reply = tool.inject(0, exception(GP, error_code, 0));
        assert_eq!(reply, Err(KvmiError::Inval), "error code {error_code:#x}");
    }
    // Nothing is left over.
    inject(&vm, &mut tool, 0, &exception(UD, 0, 0));
    vcpu.expect_running();
}

fn every_padding_byte_must_be_zero(_: &Ctx) {
    let (vm, _vcpu, mut tool) = spinning_vm();
    let good = exception(UD, 0, 0).as_bytes().to_vec();
    for at in 1..4 {
        for value in [1, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            let reply = tool.call_vcpu(0, Command::VcpuInjectException, &bad);
            assert_eq!(reply, Err(KvmiError::Inval), "byte {at}");
        }
    }
    inject(&vm, &mut tool, 0, &exception(UD, 0, 0));
}
