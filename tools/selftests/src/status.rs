// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What `/dev/kvmi` tells about VMs and sessions.

use std::{
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering},
};

use kvmi_abi::{
    dev::{Attach, VmMemory, VmStatus, STATUS_DISCONNECTED, STATUS_HOOKED},
    ioctl, Event,
};

use rustix::io::Errno;

use crate::{
    device::attach,
    harness::{note, test, Ctx, Test},
    memory::Memory,
    role::Vmm,
    sys,
    tool::Tool,
    util::wait_for,
    vm::{Guest, TestVm, MEMORY, PAGE},
};

const AREA: &str = "status";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(describes_a_vm_that_is_not_hooked),
    test!(describes_a_session),
    test!(tells_that_the_tool_has_gone),
    test!(counts_vcpus_that_serve),
    test!(counts_changes_of_memory_slots),
    test!(lists_where_a_vm_has_memory),
    test!(answers_are_whole_while_memory_slots_come_and_go).long(),
];

#[track_caller]
fn status(vm: &TestVm) -> VmStatus {
    let status = sys::vm_status(sys::open_dev(), vm.raw_fd());
    status.expect("VM_STATUS succeeds")
}

fn describes_a_vm_that_is_not_hooked(_: &Ctx) {
    let mut vm = TestVm::new();
    let expected = VmStatus {
        vm_fd: vm.raw_fd(),
        max_gpa: MEMORY as u64,
        memory_bytes: MEMORY as u64,
        vmm_pid: std::process::id() as i32,
        ..Default::default()
    };
    assert_eq!(status(&vm), expected);

    let _vcpu = vm.create_vcpu();
    let (ram, rom) = (Memory::new(3 * PAGE), Memory::new(PAGE));
    vm.add_slot(1, 0x1_0000_0000, &ram);
    vm.add_rom(2, 0xf000_0000, &rom);
    let expected = VmStatus {
        max_gpa: 0x1_0000_0000 + 3 * 4096,
        memory_bytes: (MEMORY + 4 * PAGE) as u64,
        vcpu_count: 1,
        ..expected
    };
    assert_eq!(status(&vm), expected);

    let vmm = Vmm::start(2, 0);
    let status = sys::vm_status(sys::open_dev(), vmm.vm_fd()).expect("VM_STATUS succeeds");
    assert_eq!((status.vmm_pid, status.vcpu_count), (vmm.process.pid(), 2));
}

fn describes_a_session(_: &Ctx) {
    let vm = TestVm::new();
    let uuid = *b"0123456789abcdef";
    let pid = std::process::id() as i32;
    for through_device in [false, true] {
        note!("hooked through /dev/kvmi: {through_device}");
        let (dev, mut tool) = (sys::open_dev(), Tool::new());
        let hooked = if through_device {
            sys::attach_with(
                &dev,
                Attach {
                    vm_fd: vm.raw_fd(),
                    socket_fd: tool.vmm_fd(),
                    uuid,
                    ..Default::default()
                },
            )
        } else {
            let hook = ioctl::Hook {
                fd: tool.vmm_fd(),
                uuid,
                ..Default::default()
            };
            sys::hook_with(&vm, hook)
        };
        assert_eq!(hooked, Ok(()));
        if through_device {
            sys::allow_all(&dev);
        } else {
            sys::allow_all(&vm);
        }
        let fresh = status(&vm);
        assert_eq!(fresh.flags, STATUS_HOOKED);
        assert_eq!((fresh.hooked_by, fresh.uuid), (pid, uuid));
        assert_eq!((fresh.commands, fresh.events), (0, 0));

        for _ in 0..10 {
            tool.version();
        }
        assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
        assert_eq!(sys::preunhook(&vm), Ok(()));
        tool.unhook_event();
        let used = status(&vm);
        assert_eq!((used.commands, used.events), (11, 1));

        if through_device {
            drop(dev);
        } else {
            vm.unhook();
        }
        let gone = status(&vm);
        assert_eq!((gone.flags, gone.hooked_by), (0, 0));
        assert_eq!((gone.commands, gone.events), (0, 0));
        assert_eq!(gone.uuid, [0; 16]);
    }
}

fn tells_that_the_tool_has_gone(_: &Ctx) {
    let vm = TestVm::new();
    let tool = vm.hook();
    assert_eq!(status(&vm).flags, STATUS_HOOKED);
    let _vmm_end = tool.disconnect();
    wait_for("the end of the tool is told", || {
        status(&vm).flags == STATUS_HOOKED | STATUS_DISCONNECTED
    });
    vm.unhook();
    assert_eq!(status(&vm).flags, 0);
    let mut tool = vm.hook();
    assert_eq!(status(&vm).flags, STATUS_HOOKED);
    // The host may hang up, too.
    tool.send_raw(&crate::tool::message_announcing(2, u16::MAX, &[]));
    tool.expect_closed();
    wait_for("the end of the connection is told", || {
        status(&vm).flags == STATUS_HOOKED | STATUS_DISCONNECTED
    });
}

fn counts_vcpus_that_serve(_: &Ctx) {
    let mut vm = TestVm::new();
    let served = |vm: &TestVm, count| {
        wait_for("the vCPUs serve", || status(vm).vcpus_served == count);
    };
    vm.start(Guest::Count);
    vm.start(Guest::Count);
    let _tool = vm.hook();
    served(&vm, 2);
    // One that nobody runs cannot serve; one that was added later can.
    let _never_run = vm.create_vcpu();
    vm.start(Guest::Count);
    served(&vm, 3);
    assert_eq!(status(&vm).vcpu_count, 4);
    vm.unhook();
    assert_eq!(status(&vm).vcpus_served, 0);
    let (_dev, _tool) = attach(&vm);
    served(&vm, 3);
    vm.expect_progress();
}

fn counts_changes_of_memory_slots(_: &Ctx) {
    const GPA: u64 = 0x1000_0000;
    let vm = TestVm::new();
    let slot = Memory::new(PAGE);
    vm.add_slot(1, GPA, &slot);
    let (_dev, _tool) = attach(&vm);
    assert_eq!(status(&vm).memslot_changes, 0);
    vm.remove_slot(1);
    assert_eq!(status(&vm).memslot_changes, 1);
    assert_eq!(status(&vm).max_gpa, MEMORY as u64);
    for changes in [3, 5, 7] {
        vm.add_slot(1, GPA, &slot);
        vm.remove_slot(1);
        assert_eq!(status(&vm).memslot_changes, changes);
    }
}

fn next_memory(dev: impl AsFd, vm: &TestVm, gpa: u64) -> Result<(u64, u64), Errno> {
    let request = VmMemory {
        vm_fd: vm.raw_fd(),
        gpa,
        ..Default::default()
    };
    sys::vm_memory_with(dev, request).map(|memory| (memory.gpa, memory.size))
}

fn lists_where_a_vm_has_memory(_: &Ctx) {
    let vm = TestVm::new();
    let dev = sys::open_dev();
    let next = |gpa| next_memory(&dev, &vm, gpa);
    let (ram, rom) = (Memory::new(3 * PAGE), Memory::new(PAGE));
    vm.add_slot(1, 0x1_0000_0000, &ram);
    vm.add_rom(2, 0xf000_0000, &rom);

    let low = (0, MEMORY as u64);
    assert_eq!(next(0), Ok(low));
    assert_eq!(next(MEMORY as u64 - 1), Ok(low));
    assert_eq!(next(MEMORY as u64), Ok((0xf000_0000, 4096)));
    assert_eq!(next(0xf000_1000), Ok((0x1_0000_0000, 3 * 4096)));
    assert_eq!(next(0x1_0000_2fff), Ok((0x1_0000_0000, 3 * 4096)));
    assert_eq!(next(0x1_0000_3000), Err(Errno::NOENT));
    assert_eq!(next(u64::MAX), Err(Errno::NOENT));

    let padded = VmMemory {
        vm_fd: vm.raw_fd(),
        padding: 1,
        ..Default::default()
    };
    assert_eq!(sys::vm_memory_with(&dev, padded), Err(Errno::INVAL));
    let no_vm = VmMemory {
        vm_fd: -1,
        ..Default::default()
    };
    assert_eq!(sys::vm_memory_with(&dev, no_vm), Err(Errno::BADF));
}

fn answers_are_whole_while_memory_slots_come_and_go(ctx: &Ctx) {
    const GPA: u64 = 0x1000_0000;
    let vm = TestVm::new();
    let slot = Memory::new(PAGE);
    let with_slot = GPA + PAGE as u64;
    let dev = sys::open_dev();
    let over = AtomicBool::new(false);
    let mut seen = [0, 0];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                vm.add_slot(1, GPA, &slot);
                vm.remove_slot(1);
            }
        });
        for _ in 0..ctx.rounds(60_000) {
            match status(&vm) {
                VmStatus {
                    max_gpa,
                    memory_bytes,
                    ..
                } if max_gpa == with_slot => {
                    assert_eq!(memory_bytes, (MEMORY + PAGE) as u64);
                    seen[1] += 1;
                }
                VmStatus {
                    max_gpa,
                    memory_bytes,
                    ..
                } => {
                    assert_eq!((max_gpa, memory_bytes), (MEMORY as u64, MEMORY as u64));
                    seen[0] += 1;
                }
            }
            assert_eq!(next_memory(&dev, &vm, 0), Ok((0, MEMORY as u64)));
        }
        over.store(true, Ordering::Relaxed);
    });
    note!("{} answers without the slot, {} with it", seen[0], seen[1]);
}
