// SPDX-License-Identifier: GPL-2.0 OR MIT

//! vCPUs that come after the hook, or have not been started yet.

use kvmi_abi::{Command, KvmiError};

use crate::{
    guest::{odd_values, Mode, SPIN_CODE},
    harness::{test, Ctx, Test},
    util::promptly,
    vcpu::Exit,
    vm::{Guest, TestVm},
};

const AREA: &str = "hotplug";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(vcpu_added_after_the_hook_takes_commands),
    test!(vcpu_added_after_the_hook_can_be_paused_before_it_runs),
    test!(index_counts_vcpus_as_they_were_created),
    test!(unstarted_vcpu_is_refused_until_it_starts),
    test!(unstarted_vcpu_can_be_paused),
    test!(unstarted_vcpu_does_not_delay_unhook),
];

fn vcpu_added_after_the_hook_takes_commands(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.vcpu_info(0), Err(KvmiError::Inval));
    assert_eq!(tool.request_pause(0, false), Err(KvmiError::Inval));
    for index in 0..4 {
        vm.start(Guest::Count64);
        assert!(tool.vcpu_info(index).is_ok());
        assert_eq!(tool.vcpu_info(index + 1), Err(KvmiError::Inval));
        let paused = tool.pause(index);
        assert_eq!(tool.regs(index), paused.arch.regs);
        tool.resume(&paused);
        vm.expect_progress();
    }
    vm.unhook();
    vm.expect_progress();
}

fn vcpu_added_after_the_hook_can_be_paused_before_it_runs(_: &Ctx) {
    let mut vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let mut vcpu = vm.control(Guest::Count64);
    vcpu.change_regs(odd_values);
    assert_eq!(tool.request_pause(1, true), Ok(()));
    let seq = tool.send_to(1, Command::VcpuGetInfo, &[]);
    tool.settle();
    vcpu.run();
    assert!(tool.reply_to(Command::VcpuGetInfo.id(), seq).is_ok());
    let paused = tool.vcpu_event(1, kvmi_abi::Event::Pause);
    assert_eq!(vm.count(1), 0, "the guest has run");
    tool.resume(&paused);
    vm.expect_progress_of(1);
}

fn index_counts_vcpus_as_they_were_created(_: &Ctx) {
    let mut vm = TestVm::new();
    let modes = [Mode::Long, Mode::Real, Mode::Protected32];
    let mut tool = vm.hook_allowing_all();
    let mut vcpus = modes.map(|mode| vm.control(Guest::Spin(mode)));
    for (vcpu, mark) in vcpus.iter_mut().zip(100..) {
        vcpu.change_regs(move |regs| regs.rbp = mark);
        vcpu.run();
    }
    for (index, size) in [(0, 8), (1, 2), (2, 4)] {
        let (reply, _) = tool.registers(index, &[]).expect("registers can be read");
        assert_eq!(reply.regs.rbp, 100 + u64::from(index));
        assert_eq!(reply.mode, size);
    }
}

fn unstarted_vcpu_is_refused_until_it_starts(_: &Ctx) {
    let mut vm = TestVm::new().with_irqchip();
    vm.start(Guest::Count);
    let mut vcpu = vm.control_unstarted(Guest::Count64);
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.vcpu_info(1), Err(KvmiError::Again));
    vcpu.run();
    for _ in 0..5 {
        assert_eq!(tool.vcpu_info(1), Err(KvmiError::Again));
        assert!(tool.vcpu_info(0).is_ok());
    }
    vcpu.end_run();
    vcpu.make_runnable();
    vcpu.run();
    assert!(tool.vcpu_info(1).is_ok());
    vm.expect_progress_of(1);
}

fn unstarted_vcpu_can_be_paused(_: &Ctx) {
    let mut vm = TestVm::new().with_irqchip();
    vm.start(Guest::Count);
    let mut vcpu = vm.control_unstarted(Guest::Spin(Mode::Long));
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.request_pause(1, true), Ok(()));
    vcpu.run();
    let paused = tool.vcpu_event(1, kvmi_abi::Event::Pause);
    assert_eq!(paused.arch.regs.rip, SPIN_CODE);
    // It is there now, as long as it waits.
    for _ in 0..3 {
        assert_eq!(tool.regs(1), paused.arch.regs);
    }
    tool.resume(&paused);
    // KVM tells the VMM that there was something other than a start.
    assert_eq!(vcpu.exit(), Exit::NotStarted);
    assert_eq!(tool.vcpu_info(1), Err(KvmiError::Again));
    vcpu.make_runnable();
    vcpu.run();
    assert!(tool.vcpu_info(1).is_ok());
    let paused = tool.pause(1);
    assert_eq!(paused.arch.regs.rip, SPIN_CODE);
    tool.resume(&paused);
}

fn unstarted_vcpu_does_not_delay_unhook(_: &Ctx) {
    let mut vm = TestVm::new().with_irqchip();
    vm.start(Guest::Count);
    let mut vcpu = vm.control_unstarted(Guest::Count64);
    for pause in [false, true] {
        let mut tool = vm.hook_allowing_all();
        if pause {
            assert_eq!(tool.request_pause(1, false), Ok(()));
        }
        // It may leave KVM_RUN whenever it likes: that is how KVM is.
        vcpu.run();
        if pause {
            tool.vcpu_event(1, kvmi_abi::Event::Pause);
        }
        vm.unhook();
        vcpu.end_run();
        tool.expect_closed();
    }
    promptly("the end of the vCPU", || drop(vcpu));
    vm.expect_usable();
}
