// SPDX-License-Identifier: GPL-2.0 OR MIT

//! How long a vCPU waits for its tool: the limits of EVENT_TIMEOUT and of the module.

use std::{
    env,
    fs::File,
    thread::sleep,
    time::{Duration, Instant},
};

use kvmi_abi::{
    dev::{VmStatus, STATUS_DISCONNECTED, STATUS_HOOKED},
    ioctl::{self, EventTimeout},
    Command, Event,
};

use crate::{
    guest::odd_values,
    harness::{skip, test, Ctx, Test},
    sys::{self, Errno},
    tool::Tool,
    util::{scaled, wait_for},
    vcpu::Vcpu,
    vcpu_tool::exception,
    vm::{Guest, TestVm},
};

const AREA: &str = "time_limit";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(argument_is_checked),
    test!(guest_goes_on_and_the_tool_is_disconnected),
    test!(limit_holds_for_a_trap),
    test!(registers_are_not_set_when_the_time_is_over),
    test!(without_a_limit_the_vcpu_waits),
    test!(reply_in_time_counts),
    test!(each_event_has_the_whole_time),
    test!(signals_do_not_prolong_the_time),
    test!(reply_counts_if_nobody_was_kept_waiting),
    test!(limit_can_be_set_during_an_event),
    test!(limit_can_be_lifted_during_an_event),
    test!(limit_stays_with_the_file),
    test!(other_vms_are_not_concerned),
    test!(commands_do_not_prolong_the_time),
    test!(vmm_can_set_the_limit_of_its_vm),
    test!(default_is_that_of_the_module),
];

/// A limit that is over soon.
const SHORT: Duration = Duration::from_millis(300);
/// One that leaves time for doing something before it is over, also on a slow machine.
const LONG: Duration = Duration::from_secs(1);

/// The variable that has the module's event_timeout_ms.
const DEFAULT: &str = "event_timeout_ms";

fn ms(limit: Duration) -> u32 {
    limit.as_millis().try_into().expect("a short time")
}

/// Attaches a VM to a new tool with this limit.
#[track_caller]
fn attach(vm: &TestVm, limit: Duration) -> (File, Tool) {
    let (dev, tool) = (sys::open_dev(), Tool::new());
    sys::event_timeout(&dev, ms(limit));
    sys::allow_all(&dev);
    let attached = sys::attach(&dev, vm.raw_fd(), tool.vmm_fd());
    attached.expect("the VM can be attached");
    (dev, tool)
}

/// A VM with a vCPU that counts, under the control of the test, and its tool.
fn counting_vm(limit: Duration) -> (TestVm, Vcpu, File, Tool) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count64);
    let (dev, tool) = attach(&vm, limit);
    vcpu.run();
    (vm, vcpu, dev, tool)
}

#[track_caller]
fn status(vm: &TestVm) -> VmStatus {
    let status = sys::vm_status(sys::open_dev(), vm.raw_fd());
    status.expect("VM_STATUS succeeds")
}

fn is_connected(vm: &TestVm) -> bool {
    let flags = status(vm).flags;
    assert_ne!(flags & STATUS_HOOKED, 0, "the VM stays hooked");
    flags & STATUS_DISCONNECTED == 0
}

/// Fails the test unless the guest stands still for this long.
#[track_caller]
fn expect_still(vm: &TestVm, vcpu: u32, time: Duration) {
    let count = vm.count(vcpu);
    sleep(time);
    assert_eq!(vm.count(vcpu), count, "the guest runs");
}

fn argument_is_checked(_: &Ctx) {
    let dev = sys::open_dev();
    let padded = EventTimeout { ms: 1, padding: 1 };
    assert_eq!(sys::event_timeout_with(&dev, padded), Err(Errno::INVAL));
    let unreadable = sys::unreadable::<{ kvmi_abi::dev::EVENT_TIMEOUT }>(&dev);
    assert_eq!(unreadable, Err(Errno::FAULT));
    for limit in [0, 1, u32::MAX] {
        sys::event_timeout(&dev, limit);
    }
    // What was refused has changed nothing: this is the last one, for ever.
    assert_eq!(sys::event_timeout_with(&dev, padded), Err(Errno::INVAL));
    let vm = TestVm::running(Guest::Count64, 1);
    let mut tool = Tool::new();
    assert_eq!(sys::attach(&dev, vm.raw_fd(), tool.vmm_fd()), Ok(()));
    sys::allow_all(&dev);
    let paused = tool.pause(0);
    expect_still(&vm, 0, SHORT);
    tool.resume(&paused);
    vm.expect_progress_of(0);
}

fn guest_goes_on_and_the_tool_is_disconnected(_: &Ctx) {
    let (vm, vcpu, dev, mut tool) = counting_vm(SHORT);
    let begin = Instant::now();
    tool.pause(0);
    tool.expect_closed();
    assert!(begin.elapsed() >= SHORT);
    vm.expect_progress_of(0);
    vcpu.expect_running();

    assert!(!is_connected(&vm));
    let used = status(&vm);
    assert_eq!((used.commands, used.events), (1, 1));
    assert!(Duration::from_nanos(used.held_ns) >= SHORT / 2, "{used:?}");
    assert!(Duration::from_nanos(used.held_ns) <= begin.elapsed());
    // Nothing of that is left for the next tool.
    drop(dev);
    let mut tool = vm.hook_allowing_all();
    let paused = tool.pause(0);
    tool.resume(&paused);
    vm.expect_progress_of(0);
}

fn limit_holds_for_a_trap(_: &Ctx) {
    let (vm, _vcpu, _dev, mut tool) = counting_vm(SHORT);
    assert_eq!(tool.inject(0, exception(6, 0, 0)), Ok(()));
    tool.vcpu_event(0, Event::Trap);
    tool.expect_closed();
    // As after CONTINUE: the guest gets its exception.
    wait_for("the handler runs", || vm.record(0).count == 1);
    vm.expect_progress_of(0);
}

fn registers_are_not_set_when_the_time_is_over(_: &Ctx) {
    let (vm, mut vcpu, _dev, mut tool) = counting_vm(scaled(LONG));
    let paused = tool.pause(0);
    let mut regs = paused.arch.regs;
    odd_values(&mut regs);
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    tool.expect_closed();
    vm.expect_progress_of(0);
    vcpu.stop();
    assert_eq!(vcpu.regs().r15, paused.arch.regs.r15);
}

fn without_a_limit_the_vcpu_waits(_: &Ctx) {
    let (vm, _vcpu, dev, mut tool) = counting_vm(SHORT);
    sys::event_timeout(&dev, 0);
    let paused = tool.pause(0);
    expect_still(&vm, 0, 3 * SHORT);
    assert!(is_connected(&vm));
    tool.resume(&paused);
    vm.expect_progress_of(0);
}

fn reply_in_time_counts(_: &Ctx) {
    let limit = scaled(LONG);
    let (vm, _vcpu, _dev, mut tool) = counting_vm(limit);
    let begin = Instant::now();
    let paused = tool.pause(0);
    expect_still(&vm, 0, limit / 2);
    tool.resume(&paused);
    vm.expect_progress_of(0);
    // The time of an event ends with it.
    sleep((limit + SHORT).saturating_sub(begin.elapsed()));
    assert!(tool.vcpu_info(0).is_ok());
    assert!(is_connected(&vm));
}

fn each_event_has_the_whole_time(_: &Ctx) {
    let limit = scaled(LONG);
    let (vm, _vcpu, _dev, mut tool) = counting_vm(limit);
    let begin = Instant::now();
    while begin.elapsed() < 2 * limit {
        let paused = tool.pause(0);
        sleep(limit / 4);
        tool.resume(&paused);
        vm.expect_progress_of(0);
    }
    assert!(is_connected(&vm));
}

fn signals_do_not_prolong_the_time(_: &Ctx) {
    let (vm, mut vcpu, _dev, mut tool) = counting_vm(LONG);
    tool.pause(0);
    let mut signals = 0;
    wait_for("the time is over", || {
        sleep(LONG / 10);
        vcpu.stop();
        vcpu.run();
        signals += 1;
        !is_connected(&vm)
    });
    assert!(signals > 1);
    tool.expect_closed();
    vm.expect_progress_of(0);
}

fn reply_counts_if_nobody_was_kept_waiting(_: &Ctx) {
    let limit = scaled(LONG);
    let (vm, mut vcpu, _dev, mut tool) = counting_vm(limit);
    let paused = tool.pause(0);
    vcpu.interrupt();
    sleep(limit + SHORT);
    assert!(is_connected(&vm));
    tool.resume(&paused);
    tool.settle();
    vcpu.run();
    vm.expect_progress_of(0);
    assert!(tool.vcpu_info(0).is_ok());

    // Without the reply, the time is over at once when the vCPU runs again.
    tool.pause(0);
    vcpu.interrupt();
    sleep(limit + SHORT);
    assert!(is_connected(&vm));
    vcpu.run();
    tool.expect_closed();
    vm.expect_progress_of(0);
}

fn limit_can_be_set_during_an_event(_: &Ctx) {
    let (vm, _vcpu, dev, mut tool) = counting_vm(Duration::ZERO);
    tool.pause(0);
    expect_still(&vm, 0, SHORT);
    // It counts from the event on.
    sys::event_timeout(&dev, ms(SHORT));
    tool.expect_closed();
    vm.expect_progress_of(0);
}

fn limit_can_be_lifted_during_an_event(_: &Ctx) {
    let limit = scaled(LONG);
    let (vm, _vcpu, dev, mut tool) = counting_vm(limit);
    let paused = tool.pause(0);
    sys::event_timeout(&dev, 0);
    expect_still(&vm, 0, limit + SHORT);
    tool.resume(&paused);
    vm.expect_progress_of(0);
    assert!(is_connected(&vm));
}

fn limit_stays_with_the_file(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 1);
    let dev = sys::open_dev();
    sys::event_timeout(&dev, ms(SHORT));
    for _ in 0..3 {
        let mut tool = Tool::new();
        assert_eq!(sys::attach(&dev, vm.raw_fd(), tool.vmm_fd()), Ok(()));
        sys::allow_all(&dev);
        tool.pause(0);
        tool.expect_closed();
        vm.expect_progress_of(0);
        assert_eq!(sys::unhook(&dev), Ok(()));
    }
    // Another file knows nothing of it.
    let mut tool = vm.hook_allowing_all();
    let paused = tool.pause(0);
    expect_still(&vm, 0, 2 * SHORT);
    tool.resume(&paused);
    vm.expect_progress_of(0);
}

fn other_vms_are_not_concerned(_: &Ctx) {
    let vms = [0; 2].map(|_| TestVm::running(Guest::Count64, 2));
    let (_limited, mut first) = attach(&vms[0], SHORT);
    let (_unlimited, mut second) = attach(&vms[1], Duration::ZERO);
    let paused = [0, 1].map(|vcpu| (first.pause(vcpu), second.pause(vcpu)).1);
    first.expect_closed();
    vms[0].expect_progress();
    expect_still(&vms[1], 0, SHORT);
    expect_still(&vms[1], 1, SHORT);
    paused.iter().for_each(|paused| second.resume(paused));
    vms[1].expect_progress();
}

fn commands_do_not_prolong_the_time(_: &Ctx) {
    let (vm, _vcpu, _dev, mut tool) = counting_vm(LONG);
    tool.pause(0);
    let id = Command::VcpuGetInfo.id();
    let payload = crate::vcpu_tool::vcpu_payload(0, &[]);
    // Until the host hangs up: it may do so before, in the middle of or after a command.
    let begin = Instant::now();
    while tool.try_send(id, &payload).is_ok() && tool.receive().is_some() {
        assert!(
            begin.elapsed() < crate::util::soon(),
            "the time is never over"
        );
    }
    assert!(begin.elapsed() >= LONG / 2);
    vm.expect_progress_of(0);
}

fn vmm_can_set_the_limit_of_its_vm(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 1);
    let limit = EventTimeout {
        ms: ms(SHORT),
        padding: 0,
    };
    let padded = EventTimeout {
        padding: 1,
        ..limit
    };
    assert_eq!(sys::vm_event_timeout(&vm, padded), Err(Errno::INVAL));
    assert_eq!(sys::vm_event_timeout(&vm, limit), Err(Errno::FAULT));
    let mut tool = vm.hook_allowing_all();
    assert_eq!(sys::vm_event_timeout(&vm, padded), Err(Errno::INVAL));
    let unreadable = sys::unreadable::<{ ioctl::EVENT_TIMEOUT }>(&vm);
    assert_eq!(unreadable, Err(Errno::FAULT));
    tool.pause(0);
    // Now that a vCPU waits.
    assert_eq!(sys::vm_event_timeout(&vm, limit), Ok(()));
    tool.expect_closed();
    vm.expect_progress_of(0);
}

fn default_is_that_of_the_module(_: &Ctx) {
    // Who loads the module knows how; the module does not tell.
    let Some(default) = env::var(DEFAULT).ok().and_then(|ms| ms.parse().ok()) else {
        skip("the module was loaded without event_timeout_ms");
    };
    let default = Duration::from_millis(default);
    let vm = TestVm::running(Guest::Count64, 1);
    let mut tool = vm.hook_allowing_all();
    let begin = Instant::now();
    tool.pause(0);
    tool.expect_closed();
    assert!(begin.elapsed() >= default);
    vm.expect_progress_of(0);
    drop(tool);
    vm.unhook();
    // Who attaches may decide otherwise.
    let (_dev, mut tool) = attach(&vm, Duration::ZERO);
    let paused = tool.pause(0);
    expect_still(&vm, 0, default + SHORT);
    tool.resume(&paused);
    vm.expect_progress_of(0);
}
