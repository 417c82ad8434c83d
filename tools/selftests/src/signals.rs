// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A vCPU that waits for its tool is still the VMM's: signals, the end of the VMM, other ioctls.

use kvmi_abi::{Action, Command, Event};

use crate::{
    guest::{odd_values, Mode},
    harness::{test, Ctx, Test},
    memory::Memory,
    role::Vmm,
    sys,
    tool::Tool,
    util::promptly,
    vcpu::{Exit, Vcpu},
    vm::{Guest, TestVm, PAGE},
};

const AREA: &str = "signals";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(signal_during_an_event_ends_kvm_run),
    test!(event_goes_on_at_the_next_kvm_run),
    test!(reply_while_the_vcpu_does_not_run_counts),
    test!(crash_while_the_vcpu_does_not_run_counts),
    test!(commands_wait_while_the_vcpu_does_not_run),
    test!(immediate_exit_leaves_the_event_alone),
    test!(vmm_may_look_at_a_vcpu_during_its_event),
    test!(unhook_between_two_kvm_runs_ends_the_event),
    test!(disconnect_between_two_kvm_runs_ends_the_event),
    test!(signals_without_an_event_only_end_kvm_run),
    test!(memory_slots_may_change_during_an_event),
    test!(vcpus_may_be_created_during_an_event),
    test!(vmm_may_be_killed_during_an_event).destructive(),
    test!(vmm_may_be_killed_with_commands_under_way).destructive(),
];

/// A VM with a vCPU that counts, under the control of the test, and its tool.
fn counting_vm() -> (TestVm, Vcpu, Tool) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count64);
    let tool = vm.hook_allowing_all();
    vcpu.run();
    (vm, vcpu, tool)
}

/// Fails the test unless the vCPU waits for a reply, and no other message of it is on the way.
#[track_caller]
fn expect_waiting(vm: &TestVm, tool: &mut Tool) {
    let count = vm.count(0);
    assert!(tool.vcpu_info(0).is_ok());
    assert_eq!(tool.info().vcpu_count, 1);
    assert_eq!(vm.count(0), count, "the guest runs during its event");
}

fn signal_during_an_event_ends_kvm_run(ctx: &Ctx) {
    let (vm, mut vcpu, mut tool) = counting_vm();
    for _ in 0..ctx.rounds(50) {
        let paused = tool.pause(0);
        vcpu.interrupt();
        vcpu.run();
        tool.resume(&paused);
        vm.expect_progress_of(0);
    }
}

fn event_goes_on_at_the_next_kvm_run(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = counting_vm();
    let paused = tool.pause(0);
    for _ in 0..10 {
        vcpu.interrupt();
        vcpu.run();
        // No second event comes: the next message is a reply.
        expect_waiting(&vm, &mut tool);
    }
    // The old number is still the right one, and the next event has the next one.
    tool.resume(&paused);
    vm.expect_progress_of(0);
    let next = tool.pause(0);
    assert_eq!((paused.seq, next.seq), (1, 2));
    vcpu.expect_running();
}

fn reply_while_the_vcpu_does_not_run_counts(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = counting_vm();
    for _ in 0..5 {
        let paused = tool.pause(0);
        vcpu.interrupt();
        tool.resume(&paused);
        tool.settle();
        vcpu.run();
        vm.expect_progress_of(0);
        assert!(tool.vcpu_info(0).is_ok());
    }
}

fn crash_while_the_vcpu_does_not_run_counts(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = counting_vm();
    let paused = tool.pause(0);
    let count = vm.count(0);
    vcpu.interrupt();
    tool.answer(&paused, Action::Crash);
    tool.settle();
    assert_eq!(vcpu.run_until_exit(), Exit::Shutdown);
    assert_eq!(vm.count(0), count, "the guest has run");
    // Once is once.
    vcpu.run();
    vm.expect_progress_of(0);
}

fn commands_wait_while_the_vcpu_does_not_run(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = counting_vm();
    let paused = tool.pause(0);
    vcpu.interrupt();
    let id = Command::VcpuGetRegisters;
    let sent = [(); 5].map(|()| tool.send_to(0, id, &[]));
    // VM commands do not wait.
    assert_eq!(tool.info().vcpu_count, 1);
    vcpu.run();
    for seq in sent {
        let reply = tool.reply_to(id.id(), seq);
        assert_eq!(reply.map(|data| data.len()), Ok(472));
    }
    expect_waiting(&vm, &mut tool);
    tool.resume(&paused);
    vm.expect_progress_of(0);
}

fn immediate_exit_leaves_the_event_alone(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = counting_vm();
    let paused = tool.pause(0);
    vcpu.interrupt();
    vcpu.with(|fd| fd.set_kvm_immediate_exit(1));
    for _ in 0..5 {
        let exit = promptly("KVM_RUN", || vcpu.run_until_exit());
        assert_eq!(exit, Exit::Interrupted);
    }
    vcpu.with(|fd| fd.set_kvm_immediate_exit(0));
    vcpu.run();
    expect_waiting(&vm, &mut tool);
    tool.resume(&paused);
    vm.expect_progress_of(0);
}

fn vmm_may_look_at_a_vcpu_during_its_event(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = counting_vm();
    let paused = tool.pause(0);
    vcpu.interrupt();
    assert_eq!(vcpu.regs(), paused.arch.regs);
    assert_eq!(vcpu.sregs(), paused.arch.sregs);
    // What it changes is what the tool sees from then on.
    vcpu.change_regs(odd_values);
    let regs = vcpu.regs();
    vcpu.run();
    assert_eq!(tool.regs(0), regs);
    tool.resume(&paused);
    vm.expect_progress_of(0);
    assert_eq!(tool.regs(0).r15, regs.r15);
}

fn unhook_between_two_kvm_runs_ends_the_event(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = counting_vm();
    for _ in 0..5 {
        tool.pause(0);
        assert!(tool.request_pause(0, false).is_ok());
        vcpu.interrupt();
        vm.unhook();
        tool.expect_closed();
        // The event belongs to no session, the next one included.
        tool = vm.hook_allowing_all();
        vcpu.run();
        vm.expect_progress_of(0);
        assert!(tool.vcpu_info(0).is_ok());
    }
}

fn disconnect_between_two_kvm_runs_ends_the_event(_: &Ctx) {
    let (vm, mut vcpu, mut tool) = counting_vm();
    tool.pause(0);
    assert!(tool.request_pause(0, false).is_ok());
    vcpu.interrupt();
    let _vmm_end = tool.disconnect();
    vcpu.run();
    vm.expect_progress_of(0);
    vm.unhook();
    vm.expect_progress_of(0);
}

fn signals_without_an_event_only_end_kvm_run(ctx: &Ctx) {
    let (vm, mut vcpu, mut tool) = counting_vm();
    for _ in 0..ctx.rounds(50) {
        let seq = tool.send_to(0, Command::VcpuGetInfo, &[]);
        vcpu.stop();
        // Served before or after the signal, but once.
        vcpu.run();
        assert!(tool.reply_to(Command::VcpuGetInfo.id(), seq).is_ok());
        vm.expect_progress_of(0);
    }
}

fn memory_slots_may_change_during_an_event(_: &Ctx) {
    const GPA: u64 = 0x1000_0000;
    let (vm, vcpu, mut tool) = counting_vm();
    let slot = Memory::new(4 * PAGE);
    let paused = tool.pause(0);
    for _ in 0..5 {
        promptly("adding a slot", || vm.add_slot(1, GPA, &slot));
        assert_eq!(tool.read(GPA, 16), Ok(vec![0; 16]));
        // Also while it serves commands.
        assert!(tool.vcpu_info(0).is_ok());
        promptly("removing a slot", || vm.remove_slot(1));
    }
    vcpu.expect_running();
    tool.resume(&paused);
    vm.expect_progress_of(0);

    // During a TRAP event, too.
    let injected = tool.inject(0, crate::vcpu_tool::exception(6, 0, 0));
    assert_eq!(injected, Ok(()));
    let trap = tool.vcpu_event(0, Event::Trap);
    promptly("adding a slot", || vm.add_slot(1, GPA, &slot));
    promptly("removing a slot", || vm.remove_slot(1));
    tool.resume(&trap);
    vm.expect_progress_of(0);
}

fn vcpus_may_be_created_during_an_event(_: &Ctx) {
    let (mut vm, _vcpu, mut tool) = counting_vm();
    let paused = tool.pause(0);
    promptly("a new vCPU", || vm.start(Guest::Count));
    let mut spinning = promptly("a new vCPU", || vm.control(Guest::Spin(Mode::Long)));
    spinning.run();
    assert_eq!(tool.info().vcpu_count, 3);
    for vcpu in [1, 2] {
        let other = tool.pause(vcpu);
        tool.resume(&other);
    }
    vm.expect_progress();
    let version = promptly("KVM_CHECK_EXTENSION", || {
        vm.capability(kvmi_abi::ioctl::KVM_CAP_INTROSPECTION)
    });
    assert_eq!(version, 1);
    tool.resume(&paused);
    vm.expect_progress_of(0);
}

/// A VM of another process with two vCPUs that count, and the tool that it is attached to.
fn other_process() -> (Vmm, std::fs::File, Tool) {
    let mut vmm = Vmm::start(2, 0);
    let (dev, tool) = (sys::open_dev(), Tool::new());
    let attached = sys::attach(&dev, vmm.vm_fd(), tool.vmm_fd());
    attached.expect("the VM can be attached");
    sys::allow_all(&dev);
    // From here on, the VM ends with its process.
    vmm.vm = None;
    (vmm, dev, tool)
}

fn vmm_may_be_killed_during_an_event(_: &Ctx) {
    for paused in 1..=2 {
        let (mut vmm, dev, mut tool) = other_process();
        for vcpu in 0..paused {
            tool.pause(vcpu);
        }
        promptly("the end of the VMM", || vmm.process.kill());
        tool.drain();
        promptly("close", || drop(dev));
    }
    TestVm::counting(1).expect_usable();
}

fn vmm_may_be_killed_with_commands_under_way(ctx: &Ctx) {
    let mut rng = ctx.rng();
    for _ in 0..ctx.rounds(20) {
        let (mut vmm, dev, mut tool) = other_process();
        assert!(tool.vcpu_info(0).is_ok() && tool.vcpu_info(1).is_ok());
        let mut sender = tool.another();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let payload = |nth: u16| crate::vcpu_tool::vcpu_payload(nth % 2, &[]);
                let id = Command::VcpuGetRegisters.id();
                let sent = (0..).take_while(|nth| sender.try_send(id, &payload(*nth)).is_ok());
                sent.last()
            });
            let drained = scope.spawn(move || tool.drain());
            rng.pause(std::time::Duration::from_millis(20));
            promptly("the end of the VMM", || vmm.process.kill());
            drained.join().expect("it does not panic");
        });
        promptly("close", || drop(dev));
    }
    TestVm::counting(1).expect_usable();
}
