// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Replies to vCPU events: each wrong one ends the connection, and the guest goes on.

use kvmi_abi::{id::VCPU_EVENT, vcpu::EventReply, Action, Command, Event, KvmiError};
use zerocopy::IntoBytes as _;

use crate::{
    guest::Mode,
    harness::{note, test, Ctx, Test},
    sys::{self, Errno},
    tool::{message, Tool},
    vcpu::Exit,
    vcpu_tool::{exception, vcpu_payload, Paused},
    vm::{Guest, TestVm},
};

const AREA: &str = "reply";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(reply_needs_the_number_of_the_event),
    test!(reply_must_have_its_size),
    test!(every_padding_byte_must_be_zero),
    test!(reply_must_name_the_vcpu),
    test!(reply_must_name_the_event),
    test!(only_continue_and_crash_are_taken),
    test!(trap_is_answered_as_a_trap),
    test!(reply_without_an_event_ends_the_connection),
    test!(second_reply_ends_the_connection),
    test!(wrong_reply_resumes_all_vcpus),
    test!(wrong_reply_does_not_crash_the_vm),
    test!(replies_may_be_given_in_pieces),
    test!(reply_stands_between_the_commands_before_and_after_it),
];

/// Pauses vCPU 0 of two that count, sends what `make` makes of the event, and fails the test unless
/// the host hangs up without a word and the guest goes on.
#[track_caller]
fn expect_fatal(vm: &TestVm, what: &str, make: impl FnOnce(&Paused) -> Vec<u8>) {
    note!("{what}");
    let mut tool = vm.hook_allowing_all();
    let paused = tool.pause(0);
    tool.send_raw(&make(&paused));
    tool.expect_closed();
    vm.expect_progress();
    assert_eq!(sys::hook(vm, tool.vmm_fd()), Err(Errno::EXIST));
    vm.unhook();
}

/// The right reply, but for one thing.
fn almost(paused: &Paused, change: impl FnOnce(&mut EventReply)) -> Vec<u8> {
    let mut reply = paused.reply(Action::Continue.code());
    change(&mut reply);
    message(VCPU_EVENT, paused.seq, reply.as_bytes())
}

fn reply_needs_the_number_of_the_event(_: &Ctx) {
    let vm = TestVm::counting(2);
    for offset in [1, u32::MAX, 0x100, 0x8000_0000] {
        expect_fatal(&vm, &format!("seq off by {offset:#x}"), |paused| {
            let reply = paused.reply(Action::Continue.code());
            message(
                VCPU_EVENT,
                paused.seq.wrapping_add(offset),
                reply.as_bytes(),
            )
        });
    }
    vm.expect_usable();
}

fn reply_must_have_its_size(_: &Ctx) {
    let vm = TestVm::counting(2);
    for len in (0..16).chain([17, 24, 600]) {
        expect_fatal(&vm, &format!("{len} bytes"), |paused| {
            let mut reply = paused.reply(0).as_bytes().to_vec();
            reply.resize(len, 0);
            message(VCPU_EVENT, paused.seq, &reply)
        });
    }
    vm.expect_usable();
}

fn every_padding_byte_must_be_zero(_: &Ctx) {
    let vm = TestVm::counting(2);
    for at in (2..8).chain(10..16) {
        expect_fatal(&vm, &format!("padding byte {at}"), |paused| {
            let mut reply = paused.reply(0).as_bytes().to_vec();
            reply[at] = 1;
            message(VCPU_EVENT, paused.seq, &reply)
        });
    }
    vm.expect_usable();
}

fn reply_must_name_the_vcpu(_: &Ctx) {
    let vm = TestVm::counting(2);
    for vcpu in [1, 2, 0x100, u16::MAX] {
        expect_fatal(&vm, &format!("vCPU {vcpu}"), |paused| {
            almost(paused, |reply| reply.vcpu.vcpu = vcpu)
        });
    }
    vm.expect_usable();
}

fn reply_must_name_the_event(_: &Ctx) {
    let vm = TestVm::counting(2);
    for event in (0..=20).chain([0x81, 0xff]).filter(|event| *event != 1) {
        expect_fatal(&vm, &format!("event {event}"), |paused| {
            almost(paused, |reply| reply.event = event)
        });
    }
    vm.expect_usable();
}

fn only_continue_and_crash_are_taken(_: &Ctx) {
    let vm = TestVm::counting(2);
    for action in [1, 3, 4, 0x80, 0x82, 0xff] {
        expect_fatal(&vm, &format!("action {action}"), |paused| {
            almost(paused, |reply| reply.action = action)
        });
    }
    vm.expect_usable();
}

fn trap_is_answered_as_a_trap(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 1);
    type Change = fn(&mut EventReply);
    let wrong: [(&str, Change); 3] = [
        ("RETRY", |reply| reply.action = Action::Retry.code()),
        ("PAUSE", |reply| reply.event = Event::Pause.id() as u8),
        ("padding", |reply| reply.padding2 = 1),
    ];
    for (nth, (what, change)) in (1..).zip(wrong) {
        note!("{what}");
        let mut tool = vm.hook_allowing_all();
        assert_eq!(tool.inject(0, exception(6, 0, 0)), Ok(()));
        let trap = tool.vcpu_event(0, Event::Trap);
        tool.send_raw(&almost(&trap, change));
        tool.expect_closed();
        // The exception is delivered all the same.
        vm.expect_progress();
        assert_eq!(vm.record(0).count, nth);
        vm.unhook();
    }
    vm.expect_usable();
}

/// Sends a reply to `paused` that nobody waits for (any more).
#[track_caller]
fn expect_unwanted(vm: &TestVm, mut tool: Tool, paused: &Paused) {
    tool.answer(paused, Action::Continue);
    tool.expect_closed();
    vm.expect_progress();
    vm.unhook();
}

fn reply_without_an_event_ends_the_connection(_: &Ctx) {
    let vm = TestVm::counting(2);
    let mut tool = vm.hook_allowing_all();
    let paused = tool.pause(0);
    vm.unhook();
    // The first event of each session has the same number, but none has been sent yet.
    expect_unwanted(&vm, vm.hook_allowing_all(), &paused);

    // Asked for, but not sent, as the vCPU does not run.
    let mut vm = TestVm::new();
    let _absent = vm.control(Guest::Count);
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.request_pause(0, false), Ok(()));
    expect_unwanted(&vm, tool, &paused);
}

fn second_reply_ends_the_connection(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let paused = tool.pause(0);
    tool.resume(&paused);
    vm.expect_progress();
    expect_unwanted(&vm, tool, &paused);

    // Also if another event has come since.
    let mut tool = vm.hook_allowing_all();
    let paused = tool.pause(0);
    tool.resume(&paused);
    tool.pause(0);
    expect_unwanted(&vm, tool, &paused);

    // Also if the first one has not been noticed yet.
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    vcpu.run();
    let mut tool = vm.hook_allowing_all();
    let paused = tool.pause(0);
    vcpu.interrupt();
    tool.resume(&paused);
    tool.settle();
    expect_unwanted(&vm, tool, &paused);
    vcpu.run();
    vcpu.stop();
}

fn wrong_reply_resumes_all_vcpus(_: &Ctx) {
    let vm = TestVm::counting(4);
    let mut tool = vm.hook_allowing_all();
    let events = [0, 1, 3].map(|vcpu| tool.pause(vcpu));
    // The number of one vCPU's event does not do for another one's.
    let reply = events[0].reply(Action::Continue.code());
    tool.send_raw(&message(VCPU_EVENT, events[1].seq, reply.as_bytes()));
    tool.expect_closed();
    vm.expect_progress();
    vm.unhook();
    vm.expect_usable();
}

fn wrong_reply_does_not_crash_the_vm(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count);
    vcpu.run();
    let mut tool = vm.hook_allowing_all();
    let paused = tool.pause(0);
    let bytes = almost(&paused, |reply| {
        (reply.action, reply.padding1) = (Action::Crash.code(), 1);
    });
    tool.send_raw(&bytes);
    tool.expect_closed();
    vm.expect_progress_of(0);
    vcpu.stop();
    // The right one does.
    vm.unhook();
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let paused = tool.pause(0);
    tool.answer(&paused, Action::Crash);
    assert_eq!(vcpu.exit(), Exit::Shutdown);
}

fn replies_may_be_given_in_pieces(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    for cut in [1, 8, 16, 23] {
        let paused = tool.pause(0);
        let bytes = almost(&paused, |_| ());
        let count = vm.count(0);
        tool.send_raw(&bytes[..cut]);
        assert_eq!(vm.count(0), count, "half a reply resumes the guest");
        tool.send_raw(&bytes[cut..]);
        vm.expect_progress();
    }
}

fn reply_stands_between_the_commands_before_and_after_it(ctx: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 1);
    let mut tool = vm.hook_allowing_all();
    let id = Command::VcpuSetRegisters.id();
    for round in 0..ctx.rounds(100) as u64 {
        let paused = tool.pause(0);
        let mut regs = paused.arch.regs;
        let mut set = |seq, value| {
            regs.r15 = value;
            message(id, seq, &vcpu_payload(0, regs.as_bytes()))
        };
        // All in one write.
        let (before, after) = (set(1000, round), set(1001, !round));
        let reply = almost(&paused, |_| ());
        tool.send_raw(&[before, reply, after].concat());
        assert_eq!(tool.reply_to(id, 1000), Ok(vec![]));
        // There is no event any more that this could be for.
        assert_eq!(tool.reply_to(id, 1001), Err(KvmiError::OpNotSupp));
        assert_eq!(tool.regs(0).r15, round);
    }
    vm.expect_progress();
}
