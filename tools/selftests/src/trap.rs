// SPDX-License-Identifier: GPL-2.0 OR MIT

//! TRAP events, and what may happen to an injected exception before the guest sees it.

use kvmi_abi::{
    vcpu::{TrapEvent, NO_EXCEPTION},
    Action, Command, Event, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    guest::{Mode, SPIN_CODE},
    harness::{test, Ctx, Test},
    inject::{expect_trap, inject, spinning_vm, GP, PF, UD},
    sys,
    util::wait_for,
    vcpu::{Exit, Vcpu},
    vcpu_tool::exception,
    vm::{Guest, TestVm},
};

const AREA: &str = "trap";

/// The tests of this file.
pub const TESTS: &[Test] = &[
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
