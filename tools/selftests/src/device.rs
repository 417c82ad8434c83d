// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `/dev/kvmi`: VMs hooked without the help of their VMM, by who may do that.

use std::{
    fs::{self, File},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _},
    },
};

use kvmi_abi::{
    dev::{self, Attach},
    ioctl, Event, KvmiError,
};
use rustix::thread::CapabilitySet;

use crate::{
    harness::{test, Ctx, Test},
    hook::{expect_module_in_use, wrong_sockets},
    memory::Memory,
    role::{Vmm, NOBODY, VMM_MEMORY, VMM_PATTERN},
    sys::{self, Errno},
    tool::Tool,
    util::{promptly, wait_for},
    vm::{TestVm, MEMORY, PAGE, SCRATCH},
};

const AREA: &str = "device";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(node_is_for_root_only),
    test!(attach_hooks_and_close_unhooks),
    test!(close_of_the_last_copy_of_the_file_unhooks),
    test!(attach_needs_neither_descriptor_afterwards),
    test!(reserved_fields_must_be_zero),
    test!(unreadable_argument_is_efault),
    test!(bad_vm_descriptor_is_refused),
    test!(bad_socket_is_refused),
    test!(file_attaches_one_vm_only),
    test!(vm_is_hooked_once_whoever_does_it),
    test!(unknown_ioctls_are_enotty),
    test!(masks_set_before_the_attach_hold_from_the_first_command_on),
    test!(file_without_vm_has_nothing_to_unhook),
    test!(masks_and_preunhook_work_on_the_file),
    test!(unhook_on_the_file_ends_the_connection),
    test!(attach_needs_cap_sys_admin),
    test!(attach_needs_the_right_to_trace_the_vmm),
    test!(vm_of_another_process_is_read_and_written),
    test!(module_cannot_be_unloaded_while_the_device_is_open).destructive(),
];

/// A VM attached to a tool that may do everything, and the file that keeps it so.
#[track_caller]
pub fn attach(vm: &TestVm) -> (File, Tool) {
    let (dev, tool) = (sys::open_dev(), Tool::new());
    let attached = sys::attach(&dev, vm.raw_fd(), tool.vmm_fd());
    attached.expect("the VM can be attached");
    sys::allow_all(&dev);
    (dev, tool)
}

fn node_is_for_root_only(_: &Ctx) {
    let node = fs::metadata("/dev/kvmi").expect("/dev/kvmi exists");
    assert!(node.file_type().is_char_device());
    assert_eq!((node.uid(), node.gid()), (0, 0));
    assert_eq!(node.mode() & 0o7777, 0o600);
}

fn attach_hooks_and_close_unhooks(_: &Ctx) {
    let vm = TestVm::counting(1);
    for _ in 0..5 {
        let (dev, mut tool) = attach(&vm);
        assert_eq!(tool.info().vcpu_count, 1);
        assert_eq!(sys::hook(&vm, tool.vmm_fd()), Err(Errno::EXIST));
        promptly("close", || drop(dev));
        tool.expect_closed();
        vm.expect_usable();
    }
    // A file that was never used.
    drop(sys::open_dev());
}

fn close_of_the_last_copy_of_the_file_unhooks(_: &Ctx) {
    let vm = TestVm::new();
    let (dev, mut tool) = attach(&vm);
    let copy = dev.try_clone().expect("a file can be duplicated");
    drop(dev);
    assert_eq!(tool.info().vcpu_count, 0);
    assert_eq!(sys::command(&copy, 0, 8), Ok(()));
    drop(copy);
    tool.expect_closed();
    vm.expect_usable();
}

fn attach_needs_neither_descriptor_afterwards(_: &Ctx) {
    let vmm = Vmm::start(1, 0);
    let (dev, mut tool) = (sys::open_dev(), Tool::new());
    assert_eq!(sys::attach(&dev, vmm.vm_fd(), tool.vmm_fd()), Ok(()));
    sys::allow_all(&dev);
    tool.close_vmm_end();
    let Vmm {
        mut process, vm, ..
    } = vmm;
    drop(vm);
    assert_eq!(tool.read(SCRATCH, 1), Ok(vec![VMM_PATTERN]));
    // Neither does the file keep the VM alive.
    process.kill();
    tool.expect_closed();
}

fn reserved_fields_must_be_zero(_: &Ctx) {
    let vm = TestVm::new();
    let (dev, tool) = (sys::open_dev(), Tool::new());
    let good = Attach {
        vm_fd: vm.raw_fd(),
        socket_fd: tool.vmm_fd(),
        ..Default::default()
    };
    for bit in 0..32 {
        let flags = Attach {
            flags: 1 << bit,
            ..good
        };
        assert_eq!(
            sys::attach_with(&dev, flags),
            Err(Errno::INVAL),
            "flag {bit}"
        );
        let padding = Attach {
            padding: 1 << bit,
            ..good
        };
        assert_eq!(
            sys::attach_with(&dev, padding),
            Err(Errno::INVAL),
            "bit {bit}"
        );
    }
    assert_eq!(sys::attach_with(&dev, good), Ok(()));
}

fn unreadable_argument_is_efault(_: &Ctx) {
    let dev = sys::open_dev();
    assert_eq!(sys::unreadable::<{ dev::ATTACH }>(&dev), Err(Errno::FAULT));
    assert_eq!(
        sys::unreadable::<{ dev::VM_STATUS }>(&dev),
        Err(Errno::FAULT)
    );
    assert_eq!(
        sys::unreadable::<{ ioctl::COMMAND }>(&dev),
        Err(Errno::FAULT)
    );
    assert_eq!(sys::unreadable::<{ ioctl::EVENT }>(&dev), Err(Errno::FAULT));
}

fn bad_vm_descriptor_is_refused(_: &Ctx) {
    let mut vm = TestVm::new();
    let vcpu = vm.create_vcpu();
    let (dev, tool) = (sys::open_dev(), Tool::new());
    let kvm = File::open("/dev/kvm").expect("/dev/kvm");
    let null = File::open("/dev/null").expect("/dev/null");
    let bad = [
        ("no descriptor", -1),
        ("closed descriptor", 1 << 19),
        ("/dev/null", null.as_raw_fd()),
        ("/dev/kvm", kvm.as_raw_fd()),
        ("a vCPU", vcpu.as_raw_fd()),
        ("a socket", tool.vmm_fd()),
        ("/dev/kvmi", dev.as_raw_fd()),
    ];
    for (what, fd) in bad {
        let attached = sys::attach(&dev, fd, tool.vmm_fd());
        assert!(
            matches!(attached, Err(Errno::BADF | Errno::INVAL)),
            "ATTACH of {what}: {attached:?}"
        );
        let status = sys::vm_status(&dev, fd);
        assert!(
            matches!(status, Err(Errno::BADF | Errno::INVAL)),
            "VM_STATUS of {what}: {status:?}"
        );
    }
    // The file is as good as new.
    assert_eq!(sys::attach(&dev, vm.raw_fd(), tool.vmm_fd()), Ok(()));
}

fn bad_socket_is_refused(_: &Ctx) {
    let vm = TestVm::new();
    let dev = sys::open_dev();
    for (what, fd) in wrong_sockets() {
        let attached = sys::attach(&dev, vm.raw_fd(), fd.as_raw_fd());
        assert_eq!(attached, Err(Errno::INVAL), "{what}");
    }
    for fd in [-1, 1 << 19, vm.raw_fd(), dev.as_raw_fd()] {
        let attached = sys::attach(&dev, vm.raw_fd(), fd);
        assert!(
            matches!(attached, Err(Errno::BADF | Errno::INVAL)),
            "descriptor {fd}: {attached:?}"
        );
    }
    vm.expect_usable();
    let tool = Tool::new();
    assert_eq!(sys::attach(&dev, vm.raw_fd(), tool.vmm_fd()), Ok(()));
}

fn file_attaches_one_vm_only(_: &Ctx) {
    let (vm, other) = (TestVm::new(), TestVm::new());
    let (dev, mut tool) = attach(&vm);
    let second = Tool::new();
    for fd in [vm.raw_fd(), other.raw_fd()] {
        let again = sys::attach(&dev, fd, second.vmm_fd());
        assert_eq!(again, Err(Errno::EXIST));
    }
    assert_eq!(tool.info().vcpu_count, 0);
    // The other VM has not been touched, and two files do not mind each other.
    let (_other_dev, mut other_tool) = attach(&other);
    drop(dev);
    tool.expect_closed();
    assert_eq!(other_tool.info().vcpu_count, 0);
}

fn vm_is_hooked_once_whoever_does_it(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    let (dev, second) = (sys::open_dev(), Tool::new());
    let attached = sys::attach(&dev, vm.raw_fd(), second.vmm_fd());
    assert_eq!(attached, Err(Errno::EXIST));
    // The refused file does not unhook when it is closed.
    drop(dev);
    assert_eq!(tool.version().version, 1);
    vm.unhook();

    let (_dev, mut tool) = attach(&vm);
    assert_eq!(sys::hook(&vm, second.vmm_fd()), Err(Errno::EXIST));
    let another = sys::open_dev();
    let attached = sys::attach(&another, vm.raw_fd(), second.vmm_fd());
    assert_eq!(attached, Err(Errno::EXIST));
    drop(another);
    assert_eq!(tool.version().version, 1);
}

fn unknown_ioctls_are_enotty(_: &Ctx) {
    let vm = TestVm::new();
    let dev = sys::open_dev();
    let expect_enotty = |dev: &File| {
        assert_eq!(sys::plain::<0xb902>(dev), Err(Errno::NOTTY));
        assert_eq!(sys::plain::<0xb9ff>(dev), Err(Errno::NOTTY));
        // The number of ATTACH with the size of another structure, or none.
        assert_eq!(sys::plain::<0xb900>(dev), Err(Errno::NOTTY));
        assert_eq!(sys::unreadable::<0x4018_b900>(dev), Err(Errno::NOTTY));
        // KVM's own: KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_RUN.
        assert_eq!(sys::plain::<0xae00>(dev), Err(Errno::NOTTY));
        assert_eq!(sys::plain::<0xae01>(dev), Err(Errno::NOTTY));
        assert_eq!(sys::plain::<0xae80>(dev), Err(Errno::NOTTY));
        // A VM is hooked with ATTACH here.
        assert_eq!(sys::hook(dev, -1), Err(Errno::NOTTY));
    };
    expect_enotty(&dev);
    let tool = Tool::new();
    assert_eq!(sys::attach(&dev, vm.raw_fd(), tool.vmm_fd()), Ok(()));
    expect_enotty(&dev);
}

fn masks_set_before_the_attach_hold_from_the_first_command_on(_: &Ctx) {
    let dev = sys::open_dev();
    assert_eq!(sys::command(&dev, 2, -1), Err(Errno::INVAL));
    assert_eq!(sys::command(&dev, 0, 2), Err(Errno::PERM));
    assert_eq!(sys::event(&dev, 1, 2), Err(Errno::INVAL));
    assert_eq!(sys::command(&dev, 1, 8), Ok(()));
    assert_eq!(sys::event(&dev, 1, 0), Ok(()));
    let (vm, mut tool) = (TestVm::new(), Tool::new());
    assert_eq!(sys::attach(&dev, vm.raw_fd(), tool.vmm_fd()), Ok(()));
    assert_eq!(tool.check_command(8), Ok(()));
    assert_eq!(tool.check_command(12), Err(KvmiError::Perm));
    assert_eq!(tool.check_event(0), Ok(()));
}

fn file_without_vm_has_nothing_to_unhook(_: &Ctx) {
    let dev = sys::open_dev();
    assert_eq!(sys::preunhook(&dev), Err(Errno::FAULT));
    assert_eq!(sys::unhook(&dev), Ok(()));
}

fn masks_and_preunhook_work_on_the_file(_: &Ctx) {
    let vm = TestVm::new();
    let (dev, mut tool) = (sys::open_dev(), Tool::new());
    assert_eq!(sys::attach(&dev, vm.raw_fd(), tool.vmm_fd()), Ok(()));
    assert_eq!(tool.check_command(8), Err(KvmiError::Perm));
    assert_eq!(sys::command(&dev, 1, 8), Ok(()));
    assert_eq!(tool.check_command(8), Ok(()));
    assert_eq!(tool.check_command(12), Err(KvmiError::Perm));
    assert_eq!(sys::command(&dev, 0, 2), Err(Errno::PERM));
    assert_eq!(sys::command(&dev, 1, 24), Err(Errno::INVAL));
    assert_eq!(sys::command(&dev, 1, 10), Ok(()));
    assert_eq!(sys::preunhook(&dev), Err(Errno::NOENT));
    assert_eq!(sys::event(&dev, 1, 0), Ok(()));
    assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
    assert_eq!(sys::preunhook(&dev), Ok(()));
    assert_eq!(tool.unhook_event(), 1);
}

fn unhook_on_the_file_ends_the_connection(_: &Ctx) {
    let vm = TestVm::counting(1);
    let (dev, mut tool) = attach(&vm);
    assert_eq!(promptly("UNHOOK", || sys::unhook(&dev)), Ok(()));
    tool.expect_closed();
    assert_eq!(sys::unhook(&dev), Ok(()));
    assert_eq!(sys::preunhook(&dev), Err(Errno::FAULT));
    // Neither UNHOOK on the file nor its end concerns a session that others have begun since.
    let mut tool = vm.hook();
    assert_eq!(sys::unhook(&dev), Ok(()));
    drop(dev);
    assert_eq!(tool.version().version, 1);
    vm.unhook();
    vm.expect_usable();
}

fn attach_needs_cap_sys_admin(_: &Ctx) {
    let vm = TestVm::new();
    let (dev, tool) = (sys::open_dev(), Tool::new());
    let attach = || sys::attach(&dev, vm.raw_fd(), tool.vmm_fd());
    let refused = sys::without_capability(CapabilitySet::SYS_ADMIN, attach);
    assert_eq!(refused, Err(Errno::PERM));
    assert_eq!(attach(), Ok(()));
}

fn attach_needs_the_right_to_trace_the_vmm(_: &Ctx) {
    let vmm = Vmm::start(1, NOBODY);
    let (dev, mut tool) = (sys::open_dev(), Tool::new());
    let attach = || sys::attach(&dev, vmm.vm_fd(), tool.vmm_fd());
    let refused = sys::without_capability(CapabilitySet::SYS_PTRACE, attach);
    assert_eq!(refused, Err(Errno::PERM));
    assert_eq!(attach(), Ok(()));
    sys::allow_all(&dev);
    assert_eq!(tool.read(SCRATCH, 1), Ok(vec![VMM_PATTERN]));
}

fn vm_of_another_process_is_read_and_written(_: &Ctx) {
    const MINE: u8 = 0x3b;
    let vmm = Vmm::start(2, 0);
    // What the VMM has at this address is the guest's memory; here it is something else.
    let mine = Memory::at(VMM_MEMORY, MEMORY);
    mine.fill(0, MEMORY, MINE);

    let (dev, mut tool) = (sys::open_dev(), Tool::new());
    assert_eq!(sys::attach(&dev, vmm.vm_fd(), tool.vmm_fd()), Ok(()));
    sys::allow_all(&dev);
    assert_eq!(tool.info().vcpu_count, 2);
    for page in [SCRATCH, SCRATCH + PAGE as u64, (MEMORY - PAGE) as u64] {
        assert_eq!(tool.read(page, 4096), Ok(vec![VMM_PATTERN; 4096]));
        assert_eq!(tool.write(page + 100, &[0x77; 200]), Ok(()));
        assert_eq!(tool.read(page + 99, 2), Ok(vec![VMM_PATTERN, 0x77]));
        // The VMM sees it, too.
        let path = format!("/proc/{}/mem", vmm.process.pid());
        let theirs = File::open(path).expect("the VMM's memory can be read");
        let mut bytes = [0; 4096];
        let read = theirs.read_exact_at(&mut bytes, VMM_MEMORY as u64 + page);
        read.expect("the VMM's memory can be read");
        assert_eq!(bytes[99..102], [VMM_PATTERN, 0x77, 0x77]);
        assert_eq!(bytes[299..301], [0x77, VMM_PATTERN]);
    }
    assert!(mine.read(0, MEMORY).iter().all(|byte| *byte == MINE));
    // Its guest goes on.
    let before = tool.read(0x3000, 4);
    wait_for("the guest goes on", || tool.read(0x3000, 4) != before);
    drop(dev);
    tool.expect_closed();
}

fn module_cannot_be_unloaded_while_the_device_is_open(_: &Ctx) {
    let vm = TestVm::new();
    let dev = sys::open_dev();
    expect_module_in_use();
    let tool = Tool::new();
    assert_eq!(sys::attach(&dev, vm.raw_fd(), tool.vmm_fd()), Ok(()));
    expect_module_in_use();
    assert_eq!(sys::unhook(&dev), Ok(()));
    expect_module_in_use();
}
