// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Sessions and VMs that come and go while the other one is busy.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread::scope,
    time::Duration,
};

use kvmi_abi::{Command, KvmiError};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use zerocopy::IntoBytes as _;

use crate::{
    device,
    harness::{note, skip, test, Ctx, Test},
    memory::Memory,
    role::{flood, start_attacher, Vmm},
    sys::{self, BlockedMemory},
    tool::{range, Tool},
    util::{promptly, soon, wait_for},
    vm::{Guest, TestVm, PAGE, SCRATCH},
};

const AREA: &str = "lifecycle";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(guest_runs_on_before_during_and_after_a_session),
    test!(guest_runs_on_while_the_tool_floods),
    test!(vcpu_added_after_the_hook_is_served),
    test!(halted_vcpu_serves_and_stays_halted),
    test!(halted_vcpu_does_not_delay_unhook),
    test!(vcpu_that_nobody_runs_delays_nothing),
    test!(vm_may_end_while_its_tool_floods),
    test!(slots_may_come_and_go_while_the_tool_reads),
    test!(masks_may_change_while_the_tool_works),
    test!(read_that_waits_for_memory_does_not_delay_unhook),
    test!(read_that_waits_for_memory_does_not_delay_the_end_of_the_vm),
    test!(vm_that_outlives_its_vmm_cannot_be_read).destructive(),
    test!(killed_attacher_unhooks_the_vm).destructive(),
];

fn guest_runs_on_before_during_and_after_a_session(_: &Ctx) {
    let vm = TestVm::counting(3);
    vm.expect_progress();
    let mut tool = vm.hook_allowing_all();
    vm.expect_progress();
    assert_eq!(tool.info().vcpu_count, 3);
    vm.expect_progress();
    vm.unhook();
    vm.expect_progress();
    tool.expect_closed();
}

fn guest_runs_on_while_the_tool_floods(_: &Ctx) {
    let vm = TestVm::counting(2);
    let tool = vm.hook_allowing_all();
    scope(|scope| {
        scope.spawn(|| flood(tool));
        for _ in 0..50 {
            vm.expect_progress();
        }
        vm.unhook();
    });
    vm.expect_usable();
}

fn vcpu_added_after_the_hook_is_served(_: &Ctx) {
    let mut vm = TestVm::counting(1);
    let (dev, mut tool) = device::attach(&vm);
    for count in 2..=4 {
        vm.start(Guest::Count);
        assert_eq!(tool.info().vcpu_count, count);
        wait_for("the new vCPU serves", || {
            let status = sys::vm_status(&dev, vm.raw_fd());
            status.expect("VM_STATUS succeeds").vcpus_served == count
        });
    }
    vm.expect_progress();
    promptly("close", || drop(dev));
    tool.expect_closed();
    vm.expect_progress();
    vm.expect_usable();
}

fn halted_vcpu_serves_and_stays_halted(_: &Ctx) {
    let mut vm = TestVm::new().with_irqchip();
    for nth in 0..2 {
        vm.start(Guest::Halt);
        vm.wait_until_asleep(nth);
    }
    for _ in 0..3 {
        let (dev, mut tool) = device::attach(&vm);
        wait_for("the halted vCPUs serve", || {
            let status = sys::vm_status(&dev, vm.raw_fd());
            status.expect("VM_STATUS succeeds").vcpus_served == 2
        });
        assert_eq!(tool.info().vcpu_count, 2);
        drop(dev);
        tool.expect_closed();
    }
    // Whoever wakes a vCPU must not let the guest see it.
    vm.wait_until_asleep(0);
    vm.wait_until_asleep(1);
    assert_eq!((vm.count(0), vm.count(1)), (1, 1));
}

fn halted_vcpu_does_not_delay_unhook(ctx: &Ctx) {
    let mut vm = TestVm::new().with_irqchip();
    vm.start(Guest::Halt);
    vm.start(Guest::Count);
    vm.wait_until_asleep(0);
    for _ in 0..ctx.rounds(100) {
        let _tool = vm.hook();
        vm.unhook();
    }
    vm.expect_usable();
    assert_eq!(vm.count(0), 1);
}

fn vcpu_that_nobody_runs_delays_nothing(_: &Ctx) {
    let mut vm = TestVm::new();
    let _first = vm.create_vcpu();
    let _second = vm.create_vcpu();
    for _ in 0..10 {
        let mut tool = vm.hook_allowing_all();
        assert_eq!(tool.info().vcpu_count, 2);
        vm.unhook();
    }
    let tool = vm.hook();
    promptly("the end of the VM", || drop(vm));
    drop(tool);
}

fn vm_may_end_while_its_tool_floods(ctx: &Ctx) {
    let mut rng = ctx.rng();
    for _ in 0..ctx.rounds(20) {
        let vm = TestVm::counting(2);
        let tool = vm.hook_allowing_all();
        scope(|scope| {
            scope.spawn(|| flood(tool));
            rng.pause(Duration::from_millis(20));
            promptly("the end of the VM", || drop(vm));
        });
    }
}

fn slots_may_come_and_go_while_the_tool_reads(ctx: &Ctx) {
    const GPA: u64 = 0x1000_0000;
    const VALUE: u8 = 0xc3;
    let vm = TestVm::counting(1);
    let slot = Memory::new(4 * PAGE);
    slot.fill(0, 4 * PAGE, VALUE);
    let mut tool = vm.hook_allowing_all();
    let (rounds, done) = (ctx.rounds(300), AtomicBool::new(false));
    let (mut there, mut absent) = (0, 0);
    scope(|scope| {
        scope.spawn(|| {
            for round in 0..rounds {
                // Everything in between is fast: let the tool see either state now and then.
                let pause = Duration::from_millis(u64::from(round % 16 == 0));
                promptly("adding a slot", || vm.add_slot(1, GPA, &slot));
                std::thread::sleep(pause);
                promptly("removing a slot", || vm.remove_slot(1));
                std::thread::sleep(pause);
            }
            done.store(true, Ordering::SeqCst);
        });
        while !done.load(Ordering::SeqCst) {
            match tool.read(GPA + 4096, 4096) {
                Ok(data) => {
                    assert!(
                        data == [VALUE; 4096],
                        "what was read is no memory of the VM"
                    );
                    there += 1;
                }
                Err(error) => {
                    assert_eq!(error, KvmiError::NoEnt);
                    absent += 1;
                }
            }
            match tool.write(GPA, &[VALUE; 64]) {
                Ok(()) | Err(KvmiError::NoEnt) => {}
                Err(error) => panic!("writing fails with {error}"),
            }
        }
    });
    note!("{rounds} changes; the slot was there {there} times and absent {absent} times");
    assert_eq!(tool.read(GPA, 1), Err(KvmiError::NoEnt));
    vm.expect_progress();
}

fn masks_may_change_while_the_tool_works(ctx: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook();
    let (rounds, done) = (ctx.rounds(2000), AtomicBool::new(false));
    scope(|scope| {
        scope.spawn(|| {
            for _ in 0..rounds {
                sys::command(&vm, 1, -1).expect("all commands can be allowed");
                sys::event(&vm, 1, -1).expect("all events can be allowed");
                sys::command(&vm, 0, -1).expect("all commands can be disallowed");
                sys::event(&vm, 0, -1).expect("all events can be disallowed");
            }
            done.store(true, Ordering::SeqCst);
        });
        while !done.load(Ordering::SeqCst) {
            match tool.read(SCRATCH, 8) {
                Ok(data) => assert_eq!(data, [0; 8]),
                Err(error) => assert_eq!(error, KvmiError::Perm),
            }
            assert_eq!(tool.version().version, 1);
        }
    });
    assert_eq!(tool.read(SCRATCH, 8), Err(KvmiError::Perm));
}

/// A VM whose tool waits for memory that does not come, with what holds that memory back.
fn vm_with_stuck_read() -> (TestVm, Tool, BlockedMemory) {
    const GPA: u64 = 0x1000_0000;
    let mut vm = TestVm::new();
    let slot = Memory::new(4 * PAGE);
    let blocked = match BlockedMemory::new(slot.address(), 4 * PAGE) {
        Ok(blocked) => blocked,
        Err(error) => skip(&format!("no userfaultfd: {error}")),
    };
    vm.add_slot(1, GPA, &slot);
    vm.start(Guest::Count);
    let mut tool = vm.hook_allowing_all();
    tool.send(
        Command::VmReadPhysical.id(),
        range(GPA + 4096, 16).as_bytes(),
    );
    let mut fds = [PollFd::new(&blocked, PollFlags::IN)];
    let timeout = Timespec::try_from(soon()).expect("a time");
    let ready = poll(&mut fds, Some(&timeout)).expect("poll");
    assert_eq!(ready, 1, "the read does not reach the memory");
    (vm, tool, blocked)
}

fn read_that_waits_for_memory_does_not_delay_unhook(_: &Ctx) {
    let (vm, mut tool, blocked) = vm_with_stuck_read();
    vm.expect_progress();
    vm.unhook();
    tool.expect_closed();
    // Another session does not mind, nor does it when the memory comes at last.
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.info().vcpu_count, 1);
    drop(blocked);
    assert_eq!(tool.read(SCRATCH, 8), Ok(vec![0; 8]));
    vm.unhook();
    vm.expect_usable();
}

fn read_that_waits_for_memory_does_not_delay_the_end_of_the_vm(_: &Ctx) {
    let (vm, mut tool, blocked) = vm_with_stuck_read();
    promptly("the end of the VM", || drop(vm));
    drop(blocked);
    tool.drain();
    TestVm::counting(1).expect_usable();
}

fn vm_that_outlives_its_vmm_cannot_be_read(_: &Ctx) {
    let mut vmm = Vmm::start(2, 0);
    let (dev, mut tool) = (sys::open_dev(), Tool::new());
    let attached = sys::attach(&dev, vmm.vm_fd(), tool.vmm_fd());
    attached.expect("the VM can be attached");
    sys::allow_all(&dev);
    assert!(tool.read(SCRATCH, 4096).is_ok());
    // The descriptor here keeps the VM, but its memory goes with its process.
    vmm.process.kill();
    assert_eq!(tool.read(SCRATCH, 4096), Err(KvmiError::NoEnt));
    assert_eq!(tool.write(SCRATCH, &[1; 16]), Err(KvmiError::NoEnt));
    assert_eq!(tool.version().version, 1);
    let status = sys::vm_status(&dev, vmm.vm_fd());
    note!("VM_STATUS: {status:?}");
    promptly("the end of the VM", || vmm.vm = None);
    tool.expect_closed();
    promptly("close", || drop(dev));
}

fn killed_attacher_unhooks_the_vm(ctx: &Ctx) {
    let vm = TestVm::counting(1);
    let mut rng = ctx.rng();
    for _ in 0..ctx.rounds(20) {
        let mut attacher = start_attacher(vm.raw_fd());
        rng.pause(Duration::from_millis(20));
        let other = Tool::new();
        let hooked = sys::hook(&vm, other.vmm_fd());
        assert_eq!(hooked, Err(sys::Errno::EXIST));
        attacher.kill();
        wait_for("the VM can be hooked again", || {
            sys::hook(&vm, other.vmm_fd()).is_ok()
        });
        vm.unhook();
        vm.expect_progress();
    }
    vm.expect_usable();
}
