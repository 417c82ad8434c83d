// SPDX-License-Identifier: GPL-2.0 OR MIT

//! INJECT_EXCEPTION, what the guest's handlers see of it, and TRAP events.

use kvmi_abi::{
    vcpu::{InjectException, TrapEvent, NO_EXCEPTION},
    Action, Command, Event, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    guest::{has_error_code, Mode, Record, INT3_CODE, SPIN_CODE},
    harness::{test, Ctx, Test},
    sys,
    tool::Tool,
    util::wait_for,
    vcpu::{Exit, Vcpu},
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
    test!(trap_event_must_be_allowed),
    test!(trap_that_is_not_allowed_any_more_is_not_sent),
    test!(trap_comes_before_the_handler_runs),
    test!(exception_injected_during_an_event_comes_after_it),
    test!(second_exception_is_busy_until_the_first_is_delivered),
    test!(exception_of_the_vmm_is_not_replaced),
    test!(exception_dropped_by_the_vmm_is_reported_as_lost),
    test!(exception_of_a_halted_vcpu_is_delivered),
    test!(exception_survives_the_tool),
    test!(crash_of_a_trap_ends_kvm_run),
    test!(vcpus_have_exceptions_of_their_own),
];

const UD: u8 = 6;
const GP: u8 = 13;
const PF: u8 = 14;
const DB: u8 = 1;

/// The exceptions that can be injected anywhere, whatever the CPU.
const INJECTABLE: [u8; 15] = [0, 1, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19];
/// The ones that never can.
const NEVER: [u8; 8] = [2, 9, 15, 20, 28, 29, 30, 31];

/// A VM with one vCPU that runs, with handlers for all exceptions.
fn spinning_vm() -> (TestVm, Vcpu, Tool) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    let tool = vm.hook_allowing_all();
    vcpu.run();
    (vm, vcpu, tool)
}

/// Fails the test unless the event tells this exception.
#[track_caller]
fn expect_trap(event: &Paused, expected: &InjectException) {
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
fn inject(vm: &TestVm, tool: &mut Tool, vcpu: u16, exception: &InjectException) -> Record {
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

fn trap_event_must_be_allowed(_: &Ctx) {
    let (vm, _vcpu, mut tool) = spinning_vm();
    let trap = Event::Trap.id().into();
    assert_eq!(sys::event(&vm, 0, trap), Ok(()));
    assert_eq!(tool.inject(0, exception(UD, 0, 0)), Err(KvmiError::Perm));
    // Whatever the arguments.
    let reply = tool.call_vcpu(0, Command::VcpuInjectException, &[0xff; 16]);
    assert_eq!(reply, Err(KvmiError::Perm));
    assert_eq!(sys::event(&vm, 1, trap), Ok(()));
    inject(&vm, &mut tool, 0, &exception(UD, 0, 0));
    assert_eq!(vm.record(0).count, 1);
}

fn trap_that_is_not_allowed_any_more_is_not_sent(_: &Ctx) {
    let (vm, _vcpu, mut tool) = spinning_vm();
    let paused = tool.pause(0);
    assert_eq!(tool.inject(0, exception(UD, 0, 0)), Ok(()));
    assert_eq!(sys::event(&vm, 0, Event::Trap.id().into()), Ok(()));
    tool.resume(&paused);
    // The exception comes all the same.
    wait_for("the handler runs", || vm.record(0).count == 1);
    assert!(tool.vcpu_info(0).is_ok());
}

fn trap_comes_before_the_handler_runs(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = spinning_vm();
    assert_eq!(tool.inject(0, exception(PF, 2, 0x5000)), Ok(()));
    let event = tool.vcpu_event(0, Event::Trap);
    assert_eq!(event.seq, 1);
    assert_eq!((event.arch.mode, event.arch.regs.rip), (8, SPIN_CODE));
    // Commands are served meanwhile, before a PAUSE that was asked for before them.
    assert_eq!(tool.request_pause(0, true), Ok(()));
    for _ in 0..5 {
        assert_eq!(tool.regs(0), event.arch.regs);
    }
    assert_eq!(vm.record(0).count, 0);
    vcpu.interrupt();
    assert_eq!(vcpu.regs().rip, SPIN_CODE);
    assert_eq!(vm.record(0).count, 0);
    vcpu.run();
    tool.resume(&event);
    let paused = tool.vcpu_event(0, Event::Pause);
    assert_eq!(paused.seq, 2);
    tool.resume(&paused);
    wait_for("the handler runs", || vm.record(0).count == 1);
    assert_eq!((vm.record(0).vector, vm.record(0).cr2), (PF.into(), 0x5000));
}

fn exception_injected_during_an_event_comes_after_it(_: &Ctx) {
    let (vm, _vcpu, mut tool) = spinning_vm();
    let paused = tool.pause(0);
    let fault = exception(GP, 0x10, 0);
    assert_eq!(tool.inject(0, fault), Ok(()));
    assert_eq!(tool.regs(0), paused.arch.regs);
    assert_eq!(vm.record(0).count, 0);
    tool.resume(&paused);
    let event = tool.vcpu_event(0, Event::Trap);
    assert_eq!(event.seq, paused.seq + 1);
    expect_trap(&event, &fault);
    tool.resume(&event);
    wait_for("the handler runs", || vm.record(0).count == 1);
}

fn second_exception_is_busy_until_the_first_is_delivered(_: &Ctx) {
    let (vm, _vcpu, mut tool) = spinning_vm();
    for round in 1..=3 {
        let paused = tool.pause(0);
        assert_eq!(tool.inject(0, exception(UD, 0, 0)), Ok(()));
        for nr in [UD, GP, PF] {
            let reply = tool.inject(0, exception(nr, 0, 0));
            assert_eq!(reply, Err(KvmiError::Busy));
        }
        tool.resume(&paused);
        let event = tool.vcpu_event(0, Event::Trap);
        expect_trap(&event, &exception(UD, 0, 0));
        // The event tells it, but the guest has not seen it yet.
        let reply = tool.inject(0, exception(GP, 0, 0));
        assert_eq!(reply, Err(KvmiError::Busy));
        tool.resume(&event);
        wait_for("the handler runs", || vm.record(0).count == 2 * round - 1);
        inject(&vm, &mut tool, 0, &exception(GP, 8, 0));
    }
}

fn exception_of_the_vmm_is_not_replaced(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = spinning_vm();
    vcpu.stop();
    let set = vcpu.with(|fd| {
        let mut events = fd.get_vcpu_events()?;
        events.exception.injected = 1;
        events.exception.nr = UD;
        events.exception.has_error_code = 0;
        fd.set_vcpu_events(&events)
    });
    set.expect("KVM_SET_VCPU_EVENTS");
    let id = Command::VcpuInjectException;
    let seq = tool.send_to(0, id, exception(GP, 0, 0).as_bytes());
    tool.settle();
    vcpu.run();
    assert_eq!(tool.reply_to(id.id(), seq), Err(KvmiError::Busy));
    // There is no TRAP event for it.
    wait_for("the handler runs", || vm.record(0).count == 1);
    assert!(tool.vcpu_info(0).is_ok());
    assert_eq!(vm.record(0).vector, UD.into());
    inject(&vm, &mut tool, 0, &exception(GP, 0, 0));
    assert_eq!(vm.record(0).count, 2);
}

fn exception_dropped_by_the_vmm_is_reported_as_lost(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = spinning_vm();
    let paused = tool.pause(0);
    assert_eq!(tool.inject(0, exception(UD, 0, 0)), Ok(()));
    vcpu.interrupt();
    // KVM_SET_REGS drops an exception that is pending.
    vcpu.change_regs(|_| ());
    vcpu.run();
    tool.resume(&paused);
    let event = tool.vcpu_event(0, Event::Trap);
    let expected = TrapEvent {
        nr: NO_EXCEPTION,
        ..Default::default()
    };
    assert_eq!(event.trap, Some(expected));
    tool.resume(&event);
    // That was all: the guest has seen nothing, and the next one is served.
    inject(&vm, &mut tool, 0, &exception(GP, 0, 0));
    assert_eq!(vm.record(0).count, 1);
}

fn exception_of_a_halted_vcpu_is_delivered(_: &Ctx) {
    let mut vm = TestVm::new().with_irqchip();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    // `hlt; jmp .`, behind the OUT of that code
    let halt = crate::guest::OUT_CODE + 2;
    vm.memory.write(halt + 1, &[0xeb, 0xfe]);
    vcpu.change_regs(|regs| regs.rip = halt);
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    wait_for("the vCPU halts", || tool.regs(0).rip == halt + 1);
    let record = inject(&vm, &mut tool, 0, &exception(UD, 0, 0));
    assert_eq!(record.rip, halt + 1);
}

fn exception_survives_the_tool(_: &Ctx) {
    for during_trap in [false, true] {
        let (vm, mut vcpu, mut tool) = spinning_vm();
        let paused = tool.pause(0);
        assert_eq!(tool.inject(0, exception(UD, 0, 0)), Ok(()));
        if during_trap {
            tool.resume(&paused);
            tool.vcpu_event(0, Event::Trap);
        }
        vm.unhook();
        wait_for("the handler runs", || vm.record(0).count == 1);
        // Another session has nothing to do with it.
        let mut tool = vm.hook_allowing_all();
        assert!(tool.vcpu_info(0).is_ok());
        inject(&vm, &mut tool, 0, &exception(GP, 0, 0));
        assert_eq!(vm.record(0).count, 2);
        vcpu.stop();
    }
}

fn crash_of_a_trap_ends_kvm_run(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = spinning_vm();
    assert_eq!(tool.inject(0, exception(UD, 0, 0)), Ok(()));
    let event = tool.vcpu_event(0, Event::Trap);
    tool.answer(&event, Action::Crash);
    assert_eq!(vcpu.exit(), Exit::Shutdown);
    assert_eq!(vm.record(0).count, 0);
    assert_eq!(tool.info().vcpu_count, 1);
}

fn vcpus_have_exceptions_of_their_own(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpus: Vec<_> = (0..4)
        .map(|_| vm.control(Guest::Spin(Mode::Long)))
        .collect();
    vcpus.iter_mut().for_each(Vcpu::run);
    let mut tool = vm.hook_allowing_all();
    let faults: Vec<_> = (0..4u16)
        .map(|vcpu| exception(PF, 2, 0x1000 * u64::from(vcpu)))
        .collect();
    let mut events = vec![];
    for vcpu in 0..4 {
        assert_eq!(tool.inject(vcpu, faults[usize::from(vcpu)]), Ok(()));
        events.push(tool.vcpu_event(vcpu, Event::Trap));
    }
    for event in events.iter().rev() {
        expect_trap(event, &faults[usize::from(event.vcpu)]);
        tool.resume(event);
    }
    for vcpu in 0..4 {
        wait_for("the handler runs", || vm.record(vcpu).count == 1);
        assert_eq!(vm.record(vcpu).cr2, 0x1000 * u64::from(vcpu));
    }
}
