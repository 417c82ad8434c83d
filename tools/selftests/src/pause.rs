// SPDX-License-Identifier: GPL-2.0 OR MIT

//! PAUSE_VCPU, and what every vCPU event tells.

use kvmi_abi::{
    vcpu::{PauseVcpu, MAX_PENDING_PAUSES},
    Action, Command, Event, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    guest::{odd_values, Mode},
    harness::{test, Ctx, Test},
    registers::{EFER, LSTAR, STAR},
    sys,
    util::promptly,
    vcpu::Exit,
    vm::{Guest, TestVm},
};

const AREA: &str = "pause";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(paused_vcpu_stands_still),
    test!(waiting_pause_finds_the_guest_stopped),
    test!(arguments_are_checked_in_order),
    test!(each_request_makes_an_event),
    test!(pauses_of_a_vcpu_that_does_not_run_are_limited),
    test!(commands_come_before_the_pause),
    test!(pause_that_is_not_allowed_any_more_is_not_sent),
    test!(event_tells_the_state_of_the_vcpu),
    test!(sequence_numbers_are_shared_with_the_unhook_event),
    test!(all_vcpus_can_be_paused_at_once),
    test!(crash_ends_kvm_run),
    test!(disconnect_resumes_the_guest),
    test!(unhook_resumes_the_guest),
    test!(end_of_the_vm_needs_no_reply),
];

fn paused_vcpu_stands_still(ctx: &Ctx) {
    let vm = TestVm::counting(2);
    let mut tool = vm.hook_allowing_all();
    for round in 0..ctx.rounds(100) {
        let vcpu = (round % 2) as u16;
        let paused = tool.pause_waiting(vcpu, round % 4 < 2);
        let count = vm.count(vcpu.into());
        vm.expect_progress_of((1 - vcpu).into());
        assert_eq!(vm.count(vcpu.into()), count, "the guest runs");
        tool.resume(&paused);
        vm.expect_progress_of(vcpu.into());
    }
}

fn waiting_pause_finds_the_guest_stopped(ctx: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 2);
    let mut tool = vm.hook_allowing_all();
    for round in 0..ctx.rounds(200) {
        let vcpu = (round % 2) as u16;
        let seq = tool.send_pause(vcpu, true);
        // The reply alone says that the guest has stopped, whichever comes first.
        let (mut count, mut event) = (None, None);
        while count.is_none() || event.is_none() {
            let message = tool.next();
            if message.header.id == 1 {
                event = Some(crate::vcpu_tool::Paused::from(&message));
            } else {
                assert_eq!((message.header.id, message.header.seq), (16, seq));
                assert_eq!(message.reply(), Ok(vec![]));
                count = Some(vm.count(vcpu.into()));
            }
        }
        let event = event.expect("the loop has ended");
        assert!(tool.vcpu_info(vcpu).is_ok());
        assert_eq!(Some(vm.count(vcpu.into())), count, "the guest still runs");
        tool.resume(&event);
    }
    vm.expect_progress();
}

fn arguments_are_checked_in_order(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let request = |vcpu, wait| {
        let pause = PauseVcpu {
            vcpu,
            wait,
            ..Default::default()
        };
        pause.as_bytes().to_vec()
    };
    let pause = Command::VmPauseVcpu;
    assert_eq!(sys::event(&vm, 0, Event::Pause.id().into()), Ok(()));
    for vcpu in [0, 1, u16::MAX] {
        for wait in [0, 1] {
            let reply = tool.call(pause, &request(vcpu, wait));
            assert_eq!(reply, Err(KvmiError::Perm));
        }
        for wait in [2, 0x80, 0xff] {
            let reply = tool.call(pause, &request(vcpu, wait));
            assert_eq!(reply, Err(KvmiError::Inval), "wait {wait}");
        }
        for at in 3..8 {
            let mut bad = request(vcpu, 1);
            bad[at] = 1;
            assert_eq!(tool.call(pause, &bad), Err(KvmiError::Inval), "byte {at}");
        }
    }
    assert_eq!(sys::event(&vm, 1, Event::Pause.id().into()), Ok(()));
    for vcpu in [1, 2, 0x100, 0x8000, u16::MAX] {
        let reply = tool.call(pause, &request(vcpu, 0));
        assert_eq!(reply, Err(KvmiError::Inval), "vCPU {vcpu}");
    }
    // None of these was taken for a request.
    vm.expect_progress();
    assert_eq!(tool.pause(0).seq, 1);
}

fn each_request_makes_an_event(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let first = tool.pause(0);
    for wait in [true, false, false, true] {
        // It is outside of the guest already.
        assert_eq!(tool.request_pause(0, wait), Ok(()));
    }
    tool.resume(&first);
    for nth in 1..=4 {
        let paused = tool.vcpu_event(0, Event::Pause);
        assert_eq!(paused.seq, first.seq + nth);
        assert_eq!(paused.arch.regs, first.arch.regs, "the guest has run");
        tool.resume(&paused);
    }
    vm.expect_progress();
    assert!(tool.vcpu_info(0).is_ok());
}

fn pauses_of_a_vcpu_that_does_not_run_are_limited(_: &Ctx) {
    assert_eq!(MAX_PENDING_PAUSES, 1001);
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count);
    vm.start(Guest::Count);
    let mut tool = vm.hook_allowing_all();
    for nth in 1..=MAX_PENDING_PAUSES {
        let wait = nth % 2 == 0;
        assert_eq!(tool.request_pause(0, wait), Ok(()), "request {nth}");
    }
    for _ in 0..3 {
        assert_eq!(tool.request_pause(0, false), Err(KvmiError::Busy));
        assert_eq!(tool.request_pause(0, true), Err(KvmiError::Busy));
    }
    // The other vCPU has requests of its own.
    let other = tool.pause(1);
    tool.resume(&other);
    vcpu.run();
    for nth in 1..=MAX_PENDING_PAUSES {
        let paused = tool.vcpu_event(0, Event::Pause);
        assert_eq!(paused.seq, other.seq + nth);
        if nth == 1 {
            // One is taken out of the count when its event is sent.
            assert_eq!(tool.request_pause(0, false), Ok(()));
            assert_eq!(tool.request_pause(0, false), Err(KvmiError::Busy));
        }
        tool.resume(&paused);
    }
    let last = tool.vcpu_event(0, Event::Pause);
    tool.resume(&last);
    vm.expect_progress_of(0);
}

fn commands_come_before_the_pause(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count);
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.request_pause(0, false), Ok(()));
    let sent: Vec<u32> = (0..20)
        .map(|_| tool.send_to(0, Command::VcpuGetInfo, &[]))
        .collect();
    tool.settle();
    vcpu.run();
    for seq in sent {
        assert!(tool.reply_to(Command::VcpuGetInfo.id(), seq).is_ok());
    }
    let paused = tool.vcpu_event(0, Event::Pause);
    assert_eq!(vm.count(0), 0, "the guest has run");
    tool.resume(&paused);
    vm.expect_progress_of(0);
}

fn pause_that_is_not_allowed_any_more_is_not_sent(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count);
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.request_pause(0, false), Ok(()));
    assert_eq!(sys::event(&vm, 0, Event::Pause.id().into()), Ok(()));
    vcpu.run();
    vm.expect_progress_of(0);
    assert!(tool.vcpu_info(0).is_ok());
    vm.expect_progress_of(0);
}

const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const PAT: u32 = 0x277;
const CSTAR: u32 = 0xc000_0083;
const SHADOW_GS: u32 = 0xc000_0102;

fn event_tells_the_state_of_the_vcpu(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut other = vm.control(Guest::Spin(Mode::Real));
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    vcpu.change_regs(odd_values);
    vcpu.set_msrs(&[
        (SYSENTER_CS, 0x1230),
        (SYSENTER_ESP, 0xffff_8000_0000_1000),
        (SYSENTER_EIP, 0xffff_8000_0000_2000),
        (STAR, 0x0013_0008_1111_2222),
        (LSTAR, 0xffff_8000_0000_3000),
        (CSTAR, 0xffff_8000_0000_4000),
        (PAT, 0x0006_0504_0100_0706),
        (SHADOW_GS, 0xffff_8000_0000_5000),
    ]);
    let mut tool = vm.hook_allowing_all();
    other.run();
    vcpu.run();
    let paused = tool.pause(1);
    let (reply, _) = tool.registers(1, &[]).expect("registers can be read");
    assert_eq!(paused.arch.regs, reply.regs);
    assert_eq!(paused.arch.sregs, reply.sregs);
    assert_eq!(u32::from(paused.arch.mode), reply.mode);
    vcpu.interrupt();
    assert_eq!(paused.arch.regs, vcpu.regs());
    assert_eq!(paused.arch.sregs, vcpu.sregs());
    let told = paused.arch.msrs;
    for (msr, value) in [
        (SYSENTER_CS, told.sysenter_cs),
        (SYSENTER_ESP, told.sysenter_esp),
        (SYSENTER_EIP, told.sysenter_eip),
        (EFER, told.efer),
        (STAR, told.star),
        (LSTAR, told.lstar),
        (CSTAR, told.cstar),
        (PAT, told.pat),
        (SHADOW_GS, told.shadow_gs),
    ] {
        assert_eq!(vcpu.msr(msr), value, "MSR {msr:#x}");
    }
    assert_eq!(told.lstar, 0xffff_8000_0000_3000);
    assert_eq!(told.pat, 0x0006_0504_0100_0706);
    vcpu.run();
    tool.resume(&paused);
    let paused = tool.pause(0);
    assert_eq!(paused.arch.mode, 2);
    assert_eq!((paused.arch.msrs.lstar, paused.arch.regs.r15), (0, 0));
    tool.resume(&paused);
}

fn sequence_numbers_are_shared_with_the_unhook_event(_: &Ctx) {
    let vm = TestVm::counting(2);
    for _ in 0..2 {
        let mut tool = vm.hook_allowing_all();
        assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
        let first = tool.pause(0);
        assert_eq!(first.seq, 1);
        // A vCPU that waits is no obstacle.
        assert_eq!(promptly("PREUNHOOK", || sys::preunhook(&vm)), Ok(()));
        assert_eq!(tool.unhook_event(), 2);
        let second = tool.pause(1);
        assert_eq!(second.seq, 3);
        tool.resume(&first);
        assert_eq!(sys::preunhook(&vm), Ok(()));
        assert_eq!(tool.unhook_event(), 4);
        tool.resume(&second);
        let third = tool.pause(0);
        assert_eq!(third.seq, 5);
        vm.unhook();
        tool.expect_closed();
        vm.expect_progress();
    }
}

fn all_vcpus_can_be_paused_at_once(ctx: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 4);
    let mut rng = ctx.rng();
    let mut tool = vm.hook_allowing_all();
    for _ in 0..ctx.rounds(50) {
        let mut events: Vec<_> = (0..4).map(|vcpu| tool.pause(vcpu)).collect();
        let counts = [0, 1, 2, 3].map(|vcpu| vm.count(vcpu));
        for event in &events {
            assert_eq!(tool.regs(event.vcpu), event.arch.regs);
        }
        assert_eq!(counts, [0, 1, 2, 3].map(|vcpu| vm.count(vcpu)));
        // Replies may come in any order.
        while !events.is_empty() {
            let event = events.swap_remove(rng.below(events.len()));
            tool.resume(&event);
            vm.expect_progress_of(event.vcpu.into());
        }
    }
}

fn crash_ends_kvm_run(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count);
    vm.start(Guest::Count);
    let mut tool = vm.hook_allowing_all();
    for _ in 0..3 {
        vcpu.run();
        let paused = tool.pause(0);
        let count = vm.count(0);
        tool.answer(&paused, Action::Crash);
        assert_eq!(vcpu.exit(), Exit::Shutdown);
        assert_eq!(vm.count(0), count, "the guest has run");
        // Neither the session nor the other vCPU is concerned; what happens to this one is the
        // VMM's business.
        assert_eq!(tool.info().vcpu_count, 2);
        assert!(tool.vcpu_info(1).is_ok());
        vm.expect_progress_of(1);
    }
    vcpu.run();
    vm.expect_progress_of(0);
}

fn disconnect_resumes_the_guest(_: &Ctx) {
    let vm = TestVm::counting(3);
    let mut tool = vm.hook_allowing_all();
    tool.pause(0);
    tool.pause(2);
    for _ in 0..5 {
        assert_eq!(tool.request_pause(2, false), Ok(()));
    }
    let _vmm_end = tool.disconnect();
    vm.expect_progress();
    vm.unhook();
    vm.expect_usable();
}

fn unhook_resumes_the_guest(ctx: &Ctx) {
    let vm = TestVm::counting(2);
    for _ in 0..ctx.rounds(50) {
        let mut tool = vm.hook_allowing_all();
        tool.pause(0);
        tool.pause(1);
        assert_eq!(tool.request_pause(1, true), Ok(()));
        vm.unhook();
        tool.expect_closed();
        vm.expect_progress();
    }
    vm.expect_usable();
}

fn end_of_the_vm_needs_no_reply(_: &Ctx) {
    let vm = TestVm::counting(2);
    let mut tool = vm.hook_allowing_all();
    tool.pause(0);
    tool.pause(1);
    promptly("the end of the VM", || drop(vm));
    tool.drain();
}
