// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Messages that make the host hang up, ones that must not, and tools that are slow.

use std::{
    os::fd::AsRawFd as _,
    thread::{scope, sleep},
    time::Duration,
};

use kvmi_abi::{wire::MAX_MSG_SIZE, Command, KvmiError};
use zerocopy::IntoBytes as _;

use crate::{
    harness::{note, test, Ctx, Test},
    memory::Memory,
    role::Vmm,
    sys::{self, Errno},
    tool::{message, message_announcing, range, write_payload, Tool},
    util::promptly,
    vm::{TestVm, PAGE, SCRATCH},
};

const AREA: &str = "framing";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(largest_message_is_taken_and_a_larger_one_ends_the_connection),
    test!(write_whose_data_is_cut_off_ends_the_connection),
    test!(unexpected_event_reply_ends_the_connection_without_an_answer),
    test!(message_may_arrive_byte_by_byte),
    test!(several_messages_may_arrive_at_once),
    test!(tool_may_go_away_in_the_middle_of_a_message),
    test!(commands_before_a_half_close_are_answered),
    test!(commands_after_the_end_are_not_carried_out),
    test!(tool_that_never_reads_does_not_delay_unhook),
    test!(tool_that_never_reads_does_not_delay_preunhook),
    test!(tool_that_never_reads_does_not_delay_memory_slots),
    test!(tool_that_never_reads_does_not_delay_other_vms),
    test!(tool_that_reads_late_gets_all_replies_in_order),
    test!(tool_that_never_reads_does_not_delay_the_end_of_the_vm),
    test!(tool_that_never_reads_does_not_delay_the_end_of_its_vmm).destructive(),
    test!(half_a_message_does_not_delay_unhook),
];

/// Sends `bytes` on a new connection and fails the test unless the host hangs up without an
/// answer, the VM stays hooked, and unhooking and hooking again helps.
#[track_caller]
fn expect_fatal(vm: &TestVm, bytes: &[u8], what: &str) {
    note!("{what}");
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.version().version, 1);
    tool.send_raw(bytes);
    tool.expect_closed();
    assert_eq!(sys::hook(vm, tool.vmm_fd()), Err(Errno::EXIST));
    vm.unhook();
}

/// Sends commands without reading a reply, until the host takes no more or hangs up.
#[track_caller]
fn flood_without_reading(tool: &mut Tool) -> usize {
    tool.set_patience(Duration::from_millis(500));
    let read = range(SCRATCH, 4096);
    for sent in 0..4096 {
        if let Err(error) = tool.try_send(Command::VmReadPhysical.id(), read.as_bytes()) {
            note!("the host takes {sent} commands: {error}");
            return sent;
        }
    }
    4096
}

fn largest_message_is_taken_and_a_larger_one_ends_the_connection(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    assert!(tool
        .call(Command::GetVersion, &[0xff; MAX_MSG_SIZE])
        .is_ok());
    vm.unhook();
    for size in [8185, 8186, 0x2000, 0x8000, u16::MAX] {
        for id in [2, 12, 0, 999] {
            let bytes = message_announcing(id, size, &[]);
            expect_fatal(&vm, &bytes, &format!("id {id}, size {size}"));
        }
    }
    vm.expect_usable();
}

fn write_whose_data_is_cut_off_ends_the_connection(_: &Ctx) {
    let vm = TestVm::counting(1);
    vm.memory.fill(SCRATCH, PAGE, 0x11);
    let whole = write_payload(SCRATCH, &[0x22; 24]);
    for len in (0..whole.len()).step_by(3).chain([16, whole.len() - 1]) {
        let bytes = message(Command::VmWritePhysical.id(), 7, &whole[..len]);
        expect_fatal(&vm, &bytes, &format!("{len} of {} bytes", whole.len()));
    }
    assert!(
        vm.memory.read(SCRATCH, PAGE) == [0x11; PAGE],
        "a part was written"
    );
    vm.expect_usable();
}

fn unexpected_event_reply_ends_the_connection_without_an_answer(_: &Ctx) {
    let mut vm = TestVm::counting(1);
    let _never_run = vm.create_vcpu();
    let reply = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    let other_vcpu = [9; 16];
    for payload in [&reply[..], &other_vcpu, &[], &reply[..8], &[0; 600]] {
        let bytes = message(1, 1, payload);
        expect_fatal(&vm, &bytes, &format!("reply of {} bytes", payload.len()));
    }
    vm.expect_usable();
}

fn message_may_arrive_byte_by_byte(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    let bytes = message(14, 5, &write_payload(SCRATCH, b"slowly"));
    for byte in &bytes {
        tool.send_raw(&[*byte]);
    }
    assert_eq!(tool.reply_to(14, 5), Ok(vec![]));
    assert_eq!(vm.memory.read(SCRATCH, 6), b"slowly");
    // Cut between header and payload, and inside of both.
    for cut in [3, 8, 11] {
        let bytes = message(12, 6, range(SCRATCH, 6).as_bytes());
        tool.send_raw(&bytes[..cut]);
        sleep(Duration::from_millis(20));
        tool.send_raw(&bytes[cut..]);
        assert_eq!(tool.reply_to(12, 6).as_deref(), Ok(&b"slowly"[..]));
    }
}

fn several_messages_may_arrive_at_once(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    let mut bytes = vec![];
    for seq in 0..50 {
        bytes.extend(message(2, seq, &[]));
        bytes.extend(message(14, seq, &write_payload(SCRATCH, &[seq as u8; 3])));
        bytes.extend(message(12, seq, range(SCRATCH, 3).as_bytes()));
    }
    tool.send_raw(&bytes);
    for seq in 0..50 {
        assert!(tool.reply_to(2, seq).is_ok());
        assert_eq!(tool.reply_to(14, seq), Ok(vec![]));
        assert_eq!(tool.reply_to(12, seq), Ok(vec![seq as u8; 3]));
    }
}

fn tool_may_go_away_in_the_middle_of_a_message(_: &Ctx) {
    let vm = TestVm::counting(1);
    vm.memory.fill(SCRATCH, PAGE, 0x11);
    let whole = message(14, 1, &write_payload(SCRATCH, &[0x22; 64]));
    for len in [1, 7, 8, 9, 24, 25, whole.len() - 1] {
        let mut tool = vm.hook_allowing_all();
        tool.send_raw(&whole[..len]);
        let other = Tool::new();
        if len % 2 == 0 {
            // The host sees the end of the stream and hangs up itself.
            tool.finish_sending();
            tool.expect_closed();
        } else {
            drop(tool);
        }
        assert_eq!(sys::hook(&vm, other.vmm_fd()), Err(Errno::EXIST));
        vm.unhook();
    }
    assert!(
        vm.memory.read(SCRATCH, PAGE) == [0x11; PAGE],
        "a part was written"
    );
    vm.expect_usable();
}

fn commands_before_a_half_close_are_answered(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    let sent: Vec<u32> = (0..20).map(|_| tool.send(8, &[])).collect();
    tool.finish_sending();
    for seq in sent {
        assert!(tool.reply_to(8, seq).is_ok());
    }
    tool.expect_closed();
}

fn commands_after_the_end_are_not_carried_out(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    let mut bytes = message_announcing(2, u16::MAX, &[]);
    bytes.extend(message(14, 1, &write_payload(SCRATCH, &[1; 8])));
    tool.send_raw(&bytes);
    tool.expect_closed();
    vm.unhook();
    assert_eq!(vm.memory.read(SCRATCH, 8), [0; 8]);
}

fn tool_that_never_reads_does_not_delay_unhook(ctx: &Ctx) {
    let vm = TestVm::counting(1);
    for _ in 0..ctx.rounds(5) {
        let mut tool = vm.hook_allowing_all();
        flood_without_reading(&mut tool);
        vm.expect_progress();
        vm.unhook();
        vm.expect_usable();
    }
}

fn tool_that_never_reads_does_not_delay_preunhook(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let enabled = tool.control_event(kvmi_abi::Event::Unhook, true);
    assert_eq!(enabled, Ok(()));
    flood_without_reading(&mut tool);
    scope(|scope| {
        // It may wait for the tool, but neither for ever nor in the way of UNHOOK.
        let preunhook = scope.spawn(|| sys::preunhook(&vm));
        sleep(Duration::from_millis(200));
        note!("PREUNHOOK waits: {}", !preunhook.is_finished());
        vm.unhook();
        let announced = preunhook.join().expect("it does not panic");
        note!("PREUNHOOK: {announced:?}");
        assert!(matches!(
            announced,
            Ok(()) | Err(Errno::NOENT | Errno::FAULT)
        ));
    });
    vm.expect_usable();
}

fn tool_that_never_reads_does_not_delay_memory_slots(_: &Ctx) {
    const GPA: u64 = 0x1000_0000;
    let vm = TestVm::counting(1);
    let slot = Memory::new(4 * PAGE);
    vm.add_slot(1, GPA, &slot);
    let mut tool = vm.hook_allowing_all();
    flood_without_reading(&mut tool);
    for _ in 0..5 {
        promptly("removing a slot", || vm.remove_slot(1));
        promptly("adding a slot", || vm.add_slot(1, GPA, &slot));
    }
    vm.expect_progress();
    vm.unhook();
}

fn tool_that_never_reads_does_not_delay_other_vms(_: &Ctx) {
    let (slow, other) = (TestVm::counting(1), TestVm::counting(1));
    let mut slow_tool = slow.hook_allowing_all();
    flood_without_reading(&mut slow_tool);
    for _ in 0..20 {
        promptly("a session of another VM", || other.expect_usable());
    }
    slow.unhook();
}

fn tool_that_reads_late_gets_all_replies_in_order(_: &Ctx) {
    let vm = TestVm::counting(1);
    vm.memory.fill(SCRATCH, PAGE, 0x42);
    let mut tool = vm.hook_allowing_all();
    let sent = flood_without_reading(&mut tool);
    let mut received = 0;
    while received < sent {
        // The host may lose patience with such a tool, but must not garble its replies.
        let Some(message) = tool.receive() else { break };
        received += 1;
        assert_eq!(message.header.id, 12);
        assert_eq!(message.header.seq as usize, received);
        assert_eq!(message.reply(), Ok(vec![0x42; 4096]));
    }
    note!("{received} replies to {sent} commands");
    if received == sent {
        assert_eq!(tool.check_command(0xffff), Err(KvmiError::NoEnt));
    }
    vm.unhook();
    tool.expect_closed();
    vm.expect_usable();
}

fn tool_that_never_reads_does_not_delay_the_end_of_the_vm(_: &Ctx) {
    let vm = TestVm::counting(2);
    let mut tool = vm.hook_allowing_all();
    flood_without_reading(&mut tool);
    promptly("the end of the VM", || drop(vm));
    tool.drain();
}

fn tool_that_never_reads_does_not_delay_the_end_of_its_vmm(_: &Ctx) {
    let Vmm {
        mut process, vm, ..
    } = Vmm::start(2, 0);
    let vm = vm.expect("the VM is open");
    let (dev, mut tool) = (sys::open_dev(), Tool::new());
    let attached = sys::attach(&dev, vm.as_raw_fd(), tool.vmm_fd());
    attached.expect("the VM can be attached");
    sys::allow_all(&dev);
    drop(vm);
    flood_without_reading(&mut tool);
    promptly("the end of the VMM", || process.kill());
    tool.drain();
    promptly("close", || drop(dev));
    TestVm::counting(1).expect_usable();
}

fn half_a_message_does_not_delay_unhook(_: &Ctx) {
    let vm = TestVm::counting(1);
    let bytes = message(14, 1, &write_payload(SCRATCH, &[1; 4096]));
    for len in [1, 8, 1000] {
        let mut tool = vm.hook_allowing_all();
        tool.send_raw(&bytes[..len]);
        vm.unhook();
        tool.expect_closed();
    }
    vm.expect_usable();
}
