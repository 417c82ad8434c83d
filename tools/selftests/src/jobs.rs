// SPDX-License-Identifier: GPL-2.0 OR MIT

//! How vCPU commands get to their vCPU: which are refused at once, in which order they are served,
//! and what happens if the vCPU does not run.

use std::{thread::scope, time::Duration};

use kvmi_abi::{
    id::VCPU_EVENT,
    vcpu::GetCpuid,
    wire::{VcpuHeader, MAX_MSG_SIZE},
    Command, Event, KvmiError, Scope,
};
use zerocopy::IntoBytes as _;

use crate::{
    guest::Mode,
    harness::{note, test, Ctx, Test},
    sys::{self, Errno},
    tool::{range, Tool},
    util::promptly,
    vcpu::Exit,
    vcpu_tool::{vcpu_payload, Ledger},
    vm::{Guest, TestVm, SCRATCH},
};

const AREA: &str = "jobs";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(commands_are_refused_in_the_order_of_the_protocol),
    test!(missing_vcpu_header_is_vcpu_0),
    test!(replies_of_each_vcpu_come_in_order),
    test!(vcpu_outside_of_kvm_run_answers_when_it_runs),
    test!(vcpu_outside_of_kvm_run_delays_nobody),
    test!(commands_are_served_during_an_event),
    test!(halted_vcpu_serves_commands_and_stays_halted),
    test!(flood_of_commands_lets_the_guest_run),
    test!(flood_of_a_vcpu_that_does_not_run_is_bounded),
    test!(flood_of_a_vcpu_that_does_not_run_does_not_delay_unhook),
    test!(unhook_drops_commands_that_wait),
    test!(commands_that_wait_are_gone_with_the_tool),
    test!(revoked_command_is_refused),
];

fn vcpu_commands() -> impl Iterator<Item = Command> {
    let all = Command::ALL.iter().copied();
    all.filter(|c| c.is_served() && c.scope() == Scope::Vcpu)
}

fn commands_are_refused_in_the_order_of_the_protocol(_: &Ctx) {
    let mut vm = TestVm::new().with_irqchip();
    vm.start(Guest::Count);
    let _unstarted = vm.control_unstarted(Guest::Spin(Mode::Long));
    let mut tool = vm.hook();
    let bad_padding = |vcpu, at: usize| {
        let mut payload = vcpu_payload(vcpu, &[0xff; 16]);
        payload[at] = 1;
        payload
    };
    for command in vcpu_commands() {
        assert_eq!(sys::command(&vm, 0, command.id().into()), Ok(()));
        for payload in [bad_padding(99, 4), vcpu_payload(99, &[]), vec![]] {
            let reply = tool.call(command, &payload);
            assert_eq!(reply, Err(KvmiError::Perm), "{command:?}");
        }
        assert_eq!(sys::command(&vm, 1, command.id().into()), Ok(()));
        for at in 2..size_of::<VcpuHeader>() {
            for vcpu in [0, 1, 99] {
                let reply = tool.call(command, &bad_padding(vcpu, at));
                assert_eq!(reply, Err(KvmiError::Inval), "{command:?}, byte {at}");
            }
        }
        // Whatever the arguments: only the vCPU would look at them.
        for request in [&[][..], &[0xff; 16]] {
            for vcpu in [2, 3, 0x100, 0x8000, u16::MAX] {
                let reply = tool.call_vcpu(vcpu, command, request);
                assert_eq!(reply, Err(KvmiError::Inval), "{command:?}, vCPU {vcpu}");
            }
            let reply = tool.call_vcpu(1, command, request);
            assert_eq!(reply, Err(KvmiError::Again), "{command:?}");
        }
    }
    // All that was about the headers.
    assert!(tool.vcpu_info(0).is_ok());
}

fn missing_vcpu_header_is_vcpu_0(_: &Ctx) {
    let vm = TestVm::counting(2);
    let mut tool = vm.hook_allowing_all();
    for len in 0..size_of::<VcpuHeader>() {
        let reply = tool.call(Command::VcpuGetInfo, &vec![0; len]);
        assert_eq!(reply.map(|data| data.len()), Ok(8), "{len} bytes");
    }
    let surplus = vcpu_payload(1, &[0xff; MAX_MSG_SIZE - size_of::<VcpuHeader>()]);
    assert!(tool.call(Command::VcpuGetInfo, &surplus).is_ok());
}

/// Sends a command of some kind to a vCPU or to the VM.
#[track_caller]
fn send_some(tool: &mut Tool, ledger: &mut Ledger, nth: usize, vcpu: Option<u16>) {
    let leaf = GetCpuid::default();
    let read = range(SCRATCH, 16);
    let (command, request) = match (vcpu, nth % 3) {
        (Some(_), 0) => (Command::VcpuGetInfo, &[][..]),
        (Some(_), 1) => (Command::VcpuGetRegisters, &[][..]),
        (Some(_), _) => (Command::VcpuGetCpuid, leaf.as_bytes()),
        (None, 0) => (Command::VmGetInfo, &[][..]),
        (None, 1) => (Command::VmReadPhysical, read.as_bytes()),
        (None, _) => (Command::GetVersion, &[][..]),
    };
    let seq = match vcpu {
        Some(vcpu) => tool.send_to(vcpu, command, request),
        None => tool.send(command.id(), request),
    };
    ledger.sent(vcpu, command.id(), seq);
}

/// Receives the replies to all commands, which must succeed.
#[track_caller]
fn receive_all(tool: &mut Tool, ledger: &mut Ledger) {
    while !ledger.is_empty() {
        let message = tool.next();
        let header = message.header;
        ledger.replied(&header);
        let reply = message.reply();
        assert!(reply.is_ok(), "{header:?}: {reply:?}");
    }
}

fn replies_of_each_vcpu_come_in_order(ctx: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 4);
    let mut tool = vm.hook_allowing_all();
    for _ in 0..ctx.rounds(20) {
        let mut ledger = Ledger::default();
        // Few enough to fit in the socket's buffers.
        for nth in 0..20 {
            for vcpu in [Some(0), Some(3), None, Some(1), Some(2)] {
                send_some(&mut tool, &mut ledger, nth, vcpu);
            }
        }
        receive_all(&mut tool, &mut ledger);
    }
    vm.expect_progress();
}

fn vcpu_outside_of_kvm_run_answers_when_it_runs(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count64);
    let mut tool = vm.hook_allowing_all();
    for _ in 0..5 {
        let mut ledger = Ledger::default();
        (0..20).for_each(|nth| send_some(&mut tool, &mut ledger, nth, Some(0)));
        tool.settle();
        vcpu.run();
        receive_all(&mut tool, &mut ledger);
        vm.expect_progress_of(0);
        vcpu.stop();
    }
}

fn vcpu_outside_of_kvm_run_delays_nobody(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut absent = vm.control(Guest::Count64);
    vm.start(Guest::Count);
    let mut tool = vm.hook_allowing_all();
    let seq = tool.send_to(0, Command::VcpuGetInfo, &[]);
    // Each of these fails if it gets the other reply.
    for _ in 0..20 {
        assert_eq!(tool.info().vcpu_count, 2);
        assert!(tool.vcpu_info(1).is_ok());
        assert!(tool.read(SCRATCH, 8).is_ok());
    }
    let paused = tool.pause(1);
    tool.resume(&paused);
    vm.expect_progress_of(1);
    absent.run();
    assert!(tool.reply_to(Command::VcpuGetInfo.id(), seq).is_ok());
}

fn commands_are_served_during_an_event(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 2);
    let mut tool = vm.hook_allowing_all();
    let paused = tool.pause(0);
    let count = vm.count(0);
    for _ in 0..20 {
        assert_eq!(tool.regs(0), paused.arch.regs);
        assert!(tool.vcpu_info(1).is_ok());
        assert_eq!(tool.info().vcpu_count, 2);
    }
    vm.expect_progress_of(1);
    assert_eq!(vm.count(0), count, "the guest runs during its event");
    tool.resume(&paused);
    vm.expect_progress();
}

fn halted_vcpu_serves_commands_and_stays_halted(_: &Ctx) {
    let mut vm = TestVm::new().with_irqchip();
    vm.start(Guest::Halt);
    vm.wait_until_asleep(0);
    let mut tool = vm.hook_allowing_all();
    let regs = tool.regs(0);
    for _ in 0..20 {
        assert_eq!(tool.regs(0), regs);
        let paused = tool.pause(0);
        assert_eq!(paused.arch.regs, regs);
        tool.resume(&paused);
    }
    vm.wait_until_asleep(0);
    assert_eq!((tool.regs(0), vm.count(0)), (regs, 1));
    vm.unhook();
    vm.wait_until_asleep(0);
    assert_eq!(vm.count(0), 1);
}

fn flood_of_commands_lets_the_guest_run(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 2);
    let mut tool = vm.hook_allowing_all();
    let mut sender = tool.another();
    scope(|scope| {
        scope.spawn(move || {
            let sent = (0..).take_while(|nth: &u16| {
                let id = Command::VcpuGetInfo.id();
                sender.try_send(id, &vcpu_payload(nth % 2, &[])).is_ok()
            });
            note!("at least {} commands", sent.count());
        });
        scope.spawn(move || {
            // Cut off by UNHOOK, or whole.
            while let Some(message) = tool.receive() {
                assert_eq!(message.reply().map(|data| data.len()), Ok(8));
            }
        });
        for _ in 0..50 {
            vm.expect_progress();
        }
        vm.unhook();
    });
    vm.expect_usable();
}

/// Sends large commands to vCPU 0 until the host takes no more; returns their number.
#[track_caller]
fn fill_queue(tool: &mut Tool) -> u32 {
    const LIMIT: u32 = 4096;
    tool.set_patience(Duration::from_millis(500));
    let payload = vcpu_payload(0, &[0; MAX_MSG_SIZE - size_of::<VcpuHeader>()]);
    let taken = (0..LIMIT)
        .take_while(|_| tool.try_send(Command::VcpuGetInfo.id(), &payload).is_ok())
        .count();
    note!("the host takes {taken} commands");
    let taken = taken as u32;
    assert!(taken < LIMIT, "the host queues whatever it gets");
    taken
}

fn flood_of_a_vcpu_that_does_not_run_is_bounded(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut absent = vm.control(Guest::Count64);
    vm.start(Guest::Count);
    let mut tool = vm.hook_allowing_all();
    let taken = fill_queue(&mut tool);
    vm.expect_progress_of(1);
    // None of them is lost.
    absent.run();
    for seq in 1..=taken {
        let reply = tool.reply_to(Command::VcpuGetInfo.id(), seq);
        assert!(reply.is_ok(), "command {seq}: {reply:?}");
    }
    vm.expect_progress_of(0);
}

fn flood_of_a_vcpu_that_does_not_run_does_not_delay_unhook(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut absent = vm.control(Guest::Count64);
    for _ in 0..3 {
        let mut tool = vm.hook_allowing_all();
        fill_queue(&mut tool);
        vm.unhook();
        tool.expect_closed();
    }
    let mut tool = vm.hook_allowing_all();
    fill_queue(&mut tool);
    absent.run();
    vm.unhook();
    vm.expect_progress_of(0);
    absent.stop();
    let mut tool = vm.hook_allowing_all();
    fill_queue(&mut tool);
    drop(absent);
    promptly("the end of the VM", || drop(vm));
    tool.drain();
}

/// A VM with two vCPUs: one that does not run, for which commands wait, and one that waits for the
/// reply to an event.
fn vm_with_work_under_way() -> (TestVm, crate::vcpu::Vcpu, Tool) {
    let mut vm = TestVm::new();
    let absent = vm.control(Guest::Count64);
    vm.start(Guest::Count64);
    let mut tool = vm.hook_allowing_all();
    for _ in 0..10 {
        tool.send_to(0, Command::VcpuGetRegisters, &[]);
        tool.request_pause(0, true)
            .expect("the vCPU is outside of the guest");
    }
    let paused = tool.pause(1);
    assert_eq!(tool.regs(1), paused.arch.regs);
    (vm, absent, tool)
}

fn unhook_drops_commands_that_wait(_: &Ctx) {
    let (vm, mut absent, mut tool) = vm_with_work_under_way();
    vm.unhook();
    vm.expect_progress_of(1);
    tool.expect_closed();
    // Another session gets none of their replies, and no event.
    let mut tool = vm.hook_allowing_all();
    absent.run();
    vm.expect_progress_of(0);
    assert!(tool.vcpu_info(0).is_ok());
    assert!(tool.vcpu_info(1).is_ok());
    absent.expect_running();
    absent.stop();
    vm.unhook();
    tool.expect_closed();
}

fn commands_that_wait_are_gone_with_the_tool(_: &Ctx) {
    let (vm, mut absent, tool) = vm_with_work_under_way();
    let _vmm_end = tool.disconnect();
    // Both go on although the VM is still hooked.
    vm.expect_progress_of(1);
    absent.run();
    vm.expect_progress_of(0);
    let other = Tool::new();
    assert_eq!(sys::hook(&vm, other.vmm_fd()), Err(Errno::EXIST));
    vm.unhook();
    vm.expect_progress_of(0);
    absent.stop();
    absent.change_regs(|regs| regs.rip = crate::guest::OUT_CODE);
    assert_eq!(absent.run_until_exit(), Exit::Out(0x10));
}

fn revoked_command_is_refused(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let id = i32::from(Command::VcpuGetInfo.id());
    for _ in 0..50 {
        assert!(tool.vcpu_info(0).is_ok());
        assert_eq!(sys::command(&vm, 0, id), Ok(()));
        assert_eq!(tool.vcpu_info(0), Err(KvmiError::Perm));
        assert_eq!(sys::command(&vm, 1, id), Ok(()));
    }
    // Replies to events are no command.
    let paused = tool.pause(0);
    assert_eq!(sys::command(&vm, 0, -1), Ok(()));
    assert_eq!(sys::event(&vm, 0, Event::Pause.id().into()), Ok(()));
    tool.resume(&paused);
    vm.expect_progress();
    assert_eq!(tool.check_command(VCPU_EVENT), Err(KvmiError::NoEnt));
}
