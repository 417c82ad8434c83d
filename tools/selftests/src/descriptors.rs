// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Descriptors that a tool passes along with its messages: nobody wants them, nobody keeps them.

use std::{
    io::Read as _,
    os::{fd::AsFd as _, unix::net::UnixStream},
};

use kvmi_abi::Command;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::{
    harness::{test, Ctx, Test},
    tool::{message, message_announcing, Tool},
    util::soon,
    vm::{Guest, TestVm},
};

const AREA: &str = "descriptors";

/// The tests of this file.
pub const TESTS: &[Test] = &[test!(passed_descriptors_are_dropped)];

/// Sends bytes with a descriptor; returns what tells, by its end, that the descriptor is gone.
#[track_caller]
fn send_with_descriptor(tool: &Tool, bytes: &[u8]) -> UnixStream {
    let (kept, passed) = UnixStream::pair().expect("a socket pair can be made");
    let passed = [passed.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&passed)));
    let sent = rustix::net::sendmsg(
        tool,
        &[std::io::IoSlice::new(bytes)],
        &mut control,
        SendFlags::empty(),
    );
    assert_eq!(sent, Ok(bytes.len()));
    kept
}

#[track_caller]
fn expect_gone(mut kept: UnixStream, what: &str) {
    kept.set_read_timeout(Some(soon())).expect("SO_RCVTIMEO");
    let end = kept.read(&mut [0]);
    assert_eq!(
        end.ok(),
        Some(0),
        "{what}: the descriptor is still somewhere"
    );
}

fn passed_descriptors_are_dropped(ctx: &Ctx) {
    let version = |seq| message(Command::GetVersion.id(), seq, &[]);
    // With a command, although the VM stays hooked.
    let vm = TestVm::counting(1);
    let mut tool = vm.hook();
    let kept = send_with_descriptor(&tool, &version(7));
    assert!(tool.reply_to(Command::GetVersion.id(), 7).is_ok());
    expect_gone(kept, "received");
    tool.version();
    vm.unhook();

    // Behind what ends the connection. The VMM's end stays open all the time.
    let tool = vm.hook();
    let mut bytes = message_announcing(2, u16::MAX, &[]);
    bytes.extend(version(8));
    let first = send_with_descriptor(&tool, &bytes);
    expect_gone(first, "after an error");
    vm.unhook();

    // Behind commands of a vCPU that does not run, which are not read for lack of room.
    let mut vm = TestVm::new();
    let _absent = vm.control(Guest::Count64);
    let mut tool = vm.hook_allowing_all();
    for _ in 0..50 {
        tool.send_to(0, Command::VcpuGetInfo, &[]);
    }
    let kept = send_with_descriptor(&tool, &version(9));
    vm.unhook();
    expect_gone(kept, "after UNHOOK");

    // Before the host can have looked at the socket.
    for _ in 0..ctx.rounds(50) {
        let tool = vm.hook();
        let kept = send_with_descriptor(&tool, &version(10));
        vm.unhook();
        expect_gone(kept, "after UNHOOK at once");
    }
}
