// SPDX-License-Identifier: GPL-2.0 OR MIT

//! HOOK and UNHOOK: who may, with what, and what holds afterwards.

use std::{
    fs::File,
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsRawFd as _, OwnedFd, RawFd},
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
};

use kvmi_abi::{
    id::COMMAND_IDS,
    ioctl::{self, Hook, KVM_CAP_INTROSPECTION},
    wire::VERSION,
    Command, KvmiError,
};
use rustix::net::{socket, socketpair, AddressFamily, SocketFlags, SocketType};

use crate::{
    harness::{note, test, Ctx, Test},
    sys::{self, Errno},
    tool::Tool,
    util::promptly,
    vm::{TestVm, SCRATCH},
};

const AREA: &str = "hook";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(capability_is_the_protocol_version),
    test!(without_module_every_ioctl_is_refused).without_module(),
    test!(hooked_vm_talks_to_its_tool),
    test!(padding_must_be_zero),
    test!(unreadable_argument_is_efault),
    test!(second_hook_is_refused_whatever_its_socket),
    test!(only_connected_stream_sockets_can_be_hooked),
    test!(tcp_socket_can_be_hooked),
    test!(failed_hook_leaves_the_vm_unhooked),
    test!(unhook_of_an_unhooked_vm_does_nothing),
    test!(unhook_ends_the_connection),
    test!(rehook_works_right_after_unhook),
    test!(vm_stays_hooked_when_its_tool_has_gone),
    test!(hook_holds_the_socket_itself),
    test!(closing_the_vm_ends_the_connection),
    test!(tool_that_has_gone_before_the_hook_does_no_harm),
    test!(only_three_commands_and_no_event_are_allowed_at_first),
    test!(masks_are_forgotten_on_unhook),
    test!(two_vms_are_independent),
    test!(module_cannot_be_unloaded_while_a_vm_is_hooked).destructive(),
];

fn capability_is_the_protocol_version(_: &Ctx) {
    let vm = TestVm::new();
    assert_eq!(vm.capability(KVM_CAP_INTROSPECTION), VERSION as i32);
    let kvm = kvm_ioctls::Kvm::new().expect("/dev/kvm can be opened");
    let version = kvm.check_extension_raw(KVM_CAP_INTROSPECTION.into());
    assert_eq!(version, VERSION as i32);
}

fn without_module_every_ioctl_is_refused(_: &Ctx) {
    let vm = TestVm::new();
    let tool = Tool::new();
    assert_eq!(vm.capability(KVM_CAP_INTROSPECTION), 0);
    assert_eq!(sys::hook(&vm, tool.vmm_fd()), Err(Errno::PERM));
    assert_eq!(sys::unreadable::<{ ioctl::HOOK }>(&vm), Err(Errno::PERM));
    assert_eq!(sys::command(&vm, 1, -1), Err(Errno::PERM));
    assert_eq!(sys::command(&vm, 2, 1000), Err(Errno::PERM));
    assert_eq!(sys::event(&vm, 1, -1), Err(Errno::PERM));
    assert_eq!(sys::preunhook(&vm), Err(Errno::PERM));
    assert_eq!(sys::unhook(&vm), Err(Errno::PERM));
}

fn hooked_vm_talks_to_its_tool(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    assert_eq!(tool.version().version, VERSION);
    vm.unhook();
}

fn padding_must_be_zero(_: &Ctx) {
    let vm = TestVm::new();
    let tool = Tool::new();
    let hook = |padding| Hook {
        fd: tool.vmm_fd(),
        padding,
        uuid: [0xff; 16],
    };
    let bits = (0..32).map(|bit| 1 << bit);
    for padding in bits.clone() {
        assert_eq!(sys::hook_with(&vm, hook(padding)), Err(Errno::INVAL));
    }
    assert_eq!(sys::hook_with(&vm, hook(0)), Ok(()));
    // The argument is looked at before the VM.
    for padding in bits {
        assert_eq!(sys::hook_with(&vm, hook(padding)), Err(Errno::INVAL));
    }
    assert_eq!(sys::hook_with(&vm, hook(0)), Err(Errno::EXIST));
}

fn unreadable_argument_is_efault(_: &Ctx) {
    let vm = TestVm::new();
    let _tool = vm.hook();
    assert_eq!(sys::unreadable::<{ ioctl::HOOK }>(&vm), Err(Errno::FAULT));
    assert_eq!(
        sys::unreadable::<{ ioctl::COMMAND }>(&vm),
        Err(Errno::FAULT)
    );
    assert_eq!(sys::unreadable::<{ ioctl::EVENT }>(&vm), Err(Errno::FAULT));
    vm.unhook();
    assert_eq!(sys::unreadable::<{ ioctl::HOOK }>(&vm), Err(Errno::FAULT));
}

fn second_hook_is_refused_whatever_its_socket(_: &Ctx) {
    let vm = TestVm::new();
    let mut first = vm.hook();
    let second = Tool::new();
    assert_eq!(sys::hook(&vm, second.vmm_fd()), Err(Errno::EXIST));
    assert_eq!(sys::hook(&vm, first.vmm_fd()), Err(Errno::EXIST));
    assert_eq!(sys::hook(&vm, -1), Err(Errno::EXIST));
    let file = File::open("/dev/null").expect("/dev/null");
    assert_eq!(sys::hook(&vm, file.as_raw_fd()), Err(Errno::EXIST));
    assert_eq!(first.version().version, VERSION);
}

/// Descriptors that are not connected stream sockets, with what they are.
pub fn wrong_sockets() -> Vec<(&'static str, OwnedFd)> {
    let unconnected = |family| {
        let made = socket(family, SocketType::STREAM, None);
        made.expect("a socket can be made")
    };
    let (seqpacket, peer) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket pair can be made");
    // The other ends stay open.
    std::mem::forget(peer);
    let (datagram, peer) = UnixDatagram::pair().expect("a socket pair can be made");
    std::mem::forget(peer);
    let name = format!("kvmi_test.{}", std::process::id());
    let name = SocketAddr::from_abstract_name(name).expect("a name");
    let listener = UnixListener::bind_addr(&name);
    vec![
        ("file", File::open("/dev/null").expect("/dev/null").into()),
        ("directory", File::open("/").expect("/").into()),
        ("datagram socket", datagram.into()),
        ("seqpacket socket", seqpacket),
        ("listening socket", listener.expect("a socket").into()),
        ("unconnected socket", unconnected(AddressFamily::UNIX)),
        ("unconnected TCP socket", unconnected(AddressFamily::INET)),
    ]
}

fn only_connected_stream_sockets_can_be_hooked(_: &Ctx) {
    let vm = TestVm::new();
    for (what, fd) in wrong_sockets() {
        let hooked = sys::hook(&vm, fd.as_raw_fd());
        assert_eq!(hooked, Err(Errno::INVAL), "{what}");
    }
    let closed: RawFd = 1 << 19;
    for fd in [-1, RawFd::MIN, RawFd::MAX, closed, vm.raw_fd()] {
        assert_eq!(sys::hook(&vm, fd), Err(Errno::INVAL), "descriptor {fd}");
    }
    vm.expect_usable();
}

fn tcp_socket_can_be_hooked(_: &Ctx) {
    let connect = || {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        Ok::<_, std::io::Error>((listener.accept()?.0, client))
    };
    let (vmm_end, tool_end) = match connect() {
        Ok(ends) => ends,
        Err(error) => crate::harness::skip(&format!("no TCP over 127.0.0.1: {error}")),
    };
    let vm = TestVm::new();
    assert_eq!(sys::hook(&vm, vmm_end.as_raw_fd()), Ok(()));
    // A stream is a stream: `Tool` does nothing that only UNIX sockets can do.
    let mut tool = Tool::on(UnixStream::from(OwnedFd::from(tool_end)));
    assert_eq!(tool.version().version, VERSION);
    sys::allow_all(&vm);
    vm.memory.write(SCRATCH, &[7; 4096]);
    assert_eq!(tool.read(SCRATCH, 4096), Ok(vec![7; 4096]));
    vm.unhook();
    tool.expect_closed();
}

fn failed_hook_leaves_the_vm_unhooked(_: &Ctx) {
    let vm = TestVm::counting(1);
    assert_eq!(sys::hook(&vm, -1), Err(Errno::INVAL));
    assert_eq!(sys::command(&vm, 1, -1), Err(Errno::FAULT));
    assert_eq!(sys::preunhook(&vm), Err(Errno::FAULT));
    vm.expect_usable();
}

fn unhook_of_an_unhooked_vm_does_nothing(_: &Ctx) {
    let vm = TestVm::counting(1);
    assert_eq!(sys::unhook(&vm), Ok(()));
    assert_eq!(sys::unhook(&vm), Ok(()));
    let _tool = vm.hook();
    assert_eq!(sys::unhook(&vm), Ok(()));
    assert_eq!(sys::unhook(&vm), Ok(()));
    vm.expect_usable();
}

fn unhook_ends_the_connection(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    assert_eq!(tool.version().version, VERSION);
    // The VMM's end is still open, so it is the host who hangs up.
    vm.unhook();
    tool.expect_closed();
    assert_eq!(sys::command(&vm, 1, -1), Err(Errno::FAULT));
}

fn rehook_works_right_after_unhook(_: &Ctx) {
    let mut vm = TestVm::counting(2);
    let _never_run = vm.create_vcpu();
    for _ in 0..20 {
        let mut tool = vm.hook();
        assert_eq!(tool.version().version, VERSION);
        vm.unhook();
    }
    vm.expect_progress();
}

fn vm_stays_hooked_when_its_tool_has_gone(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook();
    tool.version();
    let _vmm_end = tool.disconnect();
    let other = Tool::new();
    assert_eq!(sys::hook(&vm, other.vmm_fd()), Err(Errno::EXIST));
    assert_eq!(sys::command(&vm, 1, -1), Ok(()));
    vm.expect_progress();
    assert_eq!(sys::hook(&vm, other.vmm_fd()), Err(Errno::EXIST));
    vm.unhook();
    assert_eq!(sys::hook(&vm, other.vmm_fd()), Ok(()));
}

fn hook_holds_the_socket_itself(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    tool.close_vmm_end();
    assert_eq!(tool.version().version, VERSION);
    vm.unhook();
    tool.expect_closed();
}

fn closing_the_vm_ends_the_connection(_: &Ctx) {
    let mut vm = TestVm::counting(1);
    vm.start(crate::vm::Guest::Count);
    let mut tool = vm.hook();
    tool.version();
    promptly("the end of the VM", || drop(vm));
    tool.expect_closed();
}

fn tool_that_has_gone_before_the_hook_does_no_harm(_: &Ctx) {
    let vm = TestVm::counting(1);
    for _ in 0..20 {
        let tool = Tool::new();
        let fd = tool.vmm_fd();
        let _vmm_end = tool.disconnect();
        match sys::hook(&vm, fd) {
            Ok(()) => assert_eq!(sys::hook(&vm, fd), Err(Errno::EXIST)),
            Err(error) => assert_eq!(error, Errno::INVAL),
        }
        vm.unhook();
    }
    vm.expect_usable();
}

/// Fails the test unless the tool may do just what is allowed after HOOK.
#[track_caller]
fn expect_initial_masks(tool: &mut Tool) {
    for id in 0..COMMAND_IDS {
        let expected = match Command::from_id(id).filter(|c| c.is_served()) {
            None => Err(KvmiError::NoEnt),
            Some(Command::GetVersion | Command::VmCheckCommand | Command::VmCheckEvent) => Ok(()),
            Some(_) => Err(KvmiError::Perm),
        };
        assert_eq!(tool.check_command(id), expected, "command {id}");
    }
    assert_eq!(tool.check_event(0), Err(KvmiError::Perm));
    for command in Command::ALL.iter().filter(|c| c.is_served()) {
        if tool.check_command(command.id()) == Err(KvmiError::Perm) {
            let refused = tool.call(*command, &[0; 64]);
            assert_eq!(refused, Err(KvmiError::Perm), "{command:?}");
        }
    }
}

fn only_three_commands_and_no_event_are_allowed_at_first(_: &Ctx) {
    let vm = TestVm::new();
    expect_initial_masks(&mut vm.hook());
}

fn masks_are_forgotten_on_unhook(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    tool.control_event(kvmi_abi::Event::Unhook, true)
        .expect("allowed");
    assert_eq!(sys::preunhook(&vm), Ok(()));
    vm.unhook();

    let mut tool = vm.hook();
    expect_initial_masks(&mut tool);
    assert_eq!(sys::preunhook(&vm), Err(Errno::NOENT));
    assert_eq!(sys::event(&vm, 1, 0), Ok(()));
    assert_eq!(sys::preunhook(&vm), Err(Errno::NOENT));
}

fn two_vms_are_independent(_: &Ctx) {
    let (one, two) = (TestVm::counting(1), TestVm::counting(2));
    let mut tool_one = one.hook_allowing_all();
    let mut tool_two = two.hook();
    one.memory.write(SCRATCH, b"one");
    two.memory.write(SCRATCH, b"two");
    assert_eq!(tool_one.info().vcpu_count, 1);
    assert_eq!(tool_two.check_command(8), Err(KvmiError::Perm));
    sys::allow_all(&two);
    assert_eq!(tool_two.info().vcpu_count, 2);
    assert_eq!(tool_one.read(SCRATCH, 3).as_deref(), Ok(&b"one"[..]));
    assert_eq!(tool_two.read(SCRATCH, 3).as_deref(), Ok(&b"two"[..]));
    one.unhook();
    tool_one.expect_closed();
    assert_eq!(tool_two.info().vcpu_count, 2);
    note!("one of two VMs unhooked, the other one is served");
    two.expect_progress();
}

/// Fails the test if the module can be unloaded.
#[track_caller]
pub fn expect_module_in_use() {
    match sys::try_unload() {
        Err(Errno::AGAIN | Errno::BUSY) => {}
        Err(Errno::NOENT) => crate::harness::skip("kvmi_host is built in"),
        other => panic!("unloading the module: {other:?}"),
    }
}

fn module_cannot_be_unloaded_while_a_vm_is_hooked(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook();
    expect_module_in_use();
    assert_eq!(tool.version().version, VERSION);
    // Also when the tool has gone.
    let _vmm_end = tool.disconnect();
    expect_module_in_use();
    vm.unhook();
}
