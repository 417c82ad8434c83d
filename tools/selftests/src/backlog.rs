// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A tool that does not read: whoever has something to send to it keeps its stream in order, obeys
//! signals and the time limit.

use std::{
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use kvmi_abi::{
    dev::STATUS_DISCONNECTED,
    id::VCPU_EVENT,
    wire::{VcpuHeader, MAX_MSG_SIZE},
    Command,
};
use rustix::net::sockopt::set_socket_send_buffer_size;
use vsock::{VsockListener, VsockStream};
use zerocopy::IntoBytes as _;

use crate::{
    harness::{note, test, Ctx, Test},
    sys,
    tool::{range, Tool},
    util::{promptly, scaled, wait_for},
    vcpu::Vcpu,
    vcpu_tool::vcpu_payload,
    vm::{Guest, TestVm, SCRATCH},
};

const AREA: &str = "backlog";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(signal_in_the_middle_of_a_message_loses_nothing),
    test!(rest_of_a_message_comes_before_the_next_one),
    test!(unhook_does_not_wait_for_the_rest_of_a_message),
    test!(vcpu_that_cannot_send_is_released_in_time),
    test!(vcpu_that_waits_for_its_turn_is_released_in_time),
    test!(limit_can_be_set_while_a_vcpu_sends),
    test!(tool_that_reads_slowly_stays_connected),
    test!(tool_that_refuses_to_read_holds_nobody),
    test!(signals_end_kvm_run_under_a_flood_of_large_commands),
];

const XSAVE: Command = Command::VcpuGetXsave;
/// More replies of this size than a socket takes.
const FLOOD: usize = 120;
/// A limit that is over soon.
const SHORT: Duration = Duration::from_millis(300);

/// A connection of each kind, whose other end is there to be hooked.
fn connections() -> Vec<(&'static str, Tool)> {
    fn tool(end: impl AsFd, vmm_end: impl AsFd) -> Tool {
        let own = |fd: BorrowedFd| fd.try_clone_to_owned().expect("it can be duplicated");
        Tool::between(own(end.as_fd()), own(vmm_end.as_fd()))
    }
    let (end, vmm_end) = UnixStream::pair().expect("a socket pair can be made");
    let mut all = vec![("UNIX", tool(end, vmm_end))];

    let listener = TcpListener::bind("127.0.0.1:0").expect("TCP on the loopback");
    let end = TcpStream::connect(listener.local_addr().expect("an address"));
    let end = end.expect("TCP on the loopback");
    let (vmm_end, _) = listener.accept().expect("TCP on the loopback");
    // Less than the replies of the tests.
    set_socket_send_buffer_size(&vmm_end, 0x8000).expect("SO_SNDBUF");
    all.push(("TCP", tool(end, vmm_end)));

    // Not every kernel has a loopback for vsock.
    let port = std::process::id();
    match VsockListener::bind_with_cid_port(vsock::VMADDR_CID_LOCAL, port) {
        Ok(listener) => {
            let end = VsockStream::connect_with_cid_port(vsock::VMADDR_CID_LOCAL, port);
            let end = end.expect("vsock on the loopback");
            let (vmm_end, _) = listener.accept().expect("vsock on the loopback");
            all.push(("vsock", tool(end, vmm_end)));
        }
        Err(error) => note!("no vsock: {error}"),
    }
    all
}

/// Sends commands with large replies to vCPU 0; returns their sequence numbers.
#[track_caller]
fn flood(tool: &mut Tool) -> Vec<u32> {
    (0..FLOOD).map(|_| tool.send_to(0, XSAVE, &[])).collect()
}

/// Receives the replies to these, in this order.
#[track_caller]
fn receive(tool: &mut Tool, sent: &[u32]) {
    for seq in sent {
        let reply = tool.reply_to(XSAVE.id(), *seq);
        assert_eq!(reply.map(|data| data.len()), Ok(4096));
    }
}

/// Whether there is soon more to be received than `before`.
fn arrives(tool: &Tool, before: u64) -> bool {
    let deadline = Instant::now() + scaled(Duration::from_millis(20));
    while tool.readable() == before {
        if Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_micros(200));
    }
    true
}

/// Whether vCPU 0, which counts, still does so.
fn goes_on(vm: &TestVm) -> bool {
    let count = vm.count(0);
    let deadline = Instant::now() + scaled(SHORT);
    while vm.count(0) == count {
        if Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(1));
    }
    true
}

/// Waits until vCPU 0, which counts, does not do so any more.
#[track_caller]
fn wait_until_still(vm: &TestVm) {
    wait_for("the vCPU stands still", || !goes_on(vm));
}

/// A VM whose vCPU is stuck with replies to a tool that does not read them, with few commands left
/// that it has to serve.
#[track_caller]
fn stuck_vm(tool: &mut Tool) -> (TestVm, Vcpu, Vec<u32>) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count64);
    sys::hook(&vm, tool.vmm_fd()).expect("the VM can be hooked");
    sys::allow_all(&vm);
    vcpu.run();
    vm.expect_progress_of(0);
    let mut sent = vec![];
    // One by one, so that the receive thread is not held up.
    loop {
        let before = tool.readable();
        sent.push(tool.send_to(0, XSAVE, &[]));
        let replied = arrives(tool, before);
        if !replied && !goes_on(&vm) {
            break;
        }
        assert!(sent.len() < 3 * FLOOD, "a socket takes whatever it gets");
    }
    (vm, vcpu, sent)
}

fn signal_in_the_middle_of_a_message_loses_nothing(_: &Ctx) {
    for (kind, mut tool) in connections() {
        note!("{kind}");
        let (vm, mut vcpu, sent) = stuck_vm(&mut tool);
        for part in sent.chunks(sent.len() / 4) {
            for _ in 0..3 {
                promptly("leaving KVM_RUN upon a signal", || vcpu.stop());
                vcpu.run();
            }
            receive(&mut tool, part);
        }
        assert!(tool.vcpu_info(0).is_ok());
        vm.expect_progress_of(0);
    }
}

fn rest_of_a_message_comes_before_the_next_one(_: &Ctx) {
    for (kind, mut tool) in connections() {
        note!("{kind}");
        let (vm, mut vcpu, sent) = stuck_vm(&mut tool);
        vcpu.interrupt();
        // The thread that sends this reply has to finish what the vCPU has left.
        let version = tool.send(Command::GetVersion.id(), &[]);
        let mut received = 0;
        loop {
            let message = tool.next();
            if message.header.seq == version {
                break;
            }
            assert_eq!(message.header.seq, sent[received]);
            assert_eq!(message.reply().map(|data| data.len()), Ok(4096));
            received += 1;
        }
        note!("{received} replies before");
        assert!(received < sent.len(), "the vCPU was not stuck");
        vcpu.run();
        receive(&mut tool, &sent[received..]);
        assert!(tool.vcpu_info(0).is_ok());
        vm.expect_progress_of(0);
    }
}

fn unhook_does_not_wait_for_the_rest_of_a_message(_: &Ctx) {
    for (kind, mut tool) in connections() {
        note!("{kind}");
        let (vm, mut vcpu, _) = stuck_vm(&mut tool);
        vcpu.interrupt();
        vm.unhook();
        vcpu.run();
        vm.expect_progress_of(0);
        // The next session begins with a stream of its own.
        let mut tool = vm.hook_allowing_all();
        assert!(tool.vcpu_info(0).is_ok());
    }
}

/// Attaches a VM to a new tool with this limit, in milliseconds.
#[track_caller]
fn attach(vm: &TestVm, limit: Duration) -> (std::fs::File, Tool) {
    let (dev, tool) = (sys::open_dev(), Tool::new());
    sys::event_timeout(&dev, limit.as_millis() as u32);
    sys::allow_all(&dev);
    let attached = sys::attach(&dev, vm.raw_fd(), tool.vmm_fd());
    attached.expect("the VM can be attached");
    (dev, tool)
}

fn is_connected(vm: &TestVm) -> bool {
    let status = sys::vm_status(sys::open_dev(), vm.raw_fd());
    status.expect("VM_STATUS succeeds").flags & STATUS_DISCONNECTED == 0
}

fn vcpu_that_cannot_send_is_released_in_time(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 1);
    let (_dev, mut tool) = attach(&vm, SHORT);
    flood(&mut tool);
    wait_for("the tool is disconnected", || !is_connected(&vm));
    vm.expect_progress_of(0);
    // Whole replies, and then the end.
    tool.drain();
}

fn vcpu_that_waits_for_its_turn_is_released_in_time(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count64);
    let (dev, mut tool) = attach(&vm, Duration::ZERO);
    tool.request_pause(0, false)
        .expect("a pause can be asked for");
    // The receive thread gets stuck with these.
    let read = range(SCRATCH, 4096);
    for _ in 0..FLOOD {
        tool.send(Command::VmReadPhysical.id(), read.as_bytes());
    }
    wait_for("the receive thread is stuck", || {
        let before = tool.readable();
        sleep(scaled(Duration::from_millis(100)));
        before > 0 && tool.readable() == before
    });
    vcpu.run();
    // The PAUSE event waits behind them.
    sleep(SHORT);
    assert_eq!(vm.count(0), 0, "the guest runs");
    assert!(is_connected(&vm));
    sys::event_timeout(&dev, SHORT.as_millis() as u32);
    wait_for("the tool is disconnected", || !is_connected(&vm));
    vm.expect_progress_of(0);
    // It was never sent.
    while let Some(message) = tool.receive() {
        assert_ne!(message.header.id, VCPU_EVENT);
    }
}

fn limit_can_be_set_while_a_vcpu_sends(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 1);
    let (dev, mut tool) = attach(&vm, Duration::ZERO);
    flood(&mut tool);
    wait_until_still(&vm);
    let count = vm.count(0);
    sleep(2 * SHORT);
    assert!(is_connected(&vm));
    assert_eq!(vm.count(0), count, "the guest runs");
    sys::event_timeout(&dev, SHORT.as_millis() as u32);
    wait_for("the tool is disconnected", || !is_connected(&vm));
    vm.expect_progress_of(0);
    tool.drain();
}

fn tool_that_reads_slowly_stays_connected(_: &Ctx) {
    let limit = scaled(Duration::from_secs(1));
    let vm = TestVm::running(Guest::Count64, 1);
    let (_dev, mut tool) = attach(&vm, limit);
    // The limit is for each message, and not for all of them.
    let sent = flood(&mut tool);
    for part in sent.chunks(FLOOD / 8) {
        sleep(limit / 4);
        receive(&mut tool, part);
    }
    assert!(is_connected(&vm));
    vm.expect_progress_of(0);
}

fn tool_that_refuses_to_read_holds_nobody(_: &Ctx) {
    let mut tool = Tool::new();
    let (vm, _vcpu, _) = stuck_vm(&mut tool);
    // Neither hangs up nor reads.
    tool.finish_receiving();
    vm.expect_progress_of(0);
    wait_for("the connection is closed", || !is_connected(&vm));
}

fn signals_end_kvm_run_under_a_flood_of_large_commands(ctx: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Count64);
    let mut tool = vm.hook_allowing_all();
    let mut sender = tool.another();
    vcpu.run();
    scope(|scope| {
        scope.spawn(move || {
            let payload = vcpu_payload(0, &[0; MAX_MSG_SIZE - size_of::<VcpuHeader>()]);
            let id = Command::VcpuGetInfo.id();
            while sender.try_send(id, &payload).is_ok() {}
        });
        scope.spawn(move || {
            // Cut off by UNHOOK, or whole.
            while let Some(message) = tool.receive() {
                assert_eq!(message.reply().map(|data| data.len()), Ok(8));
            }
        });
        for _ in 0..ctx.rounds(50) {
            promptly("leaving KVM_RUN upon a signal", || vcpu.stop());
            vcpu.run();
            vm.expect_progress_of(0);
        }
        vm.unhook();
    });
    vm.expect_usable();
}
