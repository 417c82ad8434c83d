// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The same things many times, at random moments, and from several threads at once.

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        Barrier,
    },
    thread::{scope, yield_now},
    time::Duration,
};

use kvmi_abi::Event;

use crate::{
    device,
    harness::{note, test, Ctx, Test},
    role::{flood, start_flood, Vmm},
    sys::{self, Errno},
    tool::Tool,
    util::{promptly, Rng},
    vm::{Guest, TestVm, SCRATCH},
};

const AREA: &str = "stress";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(thousand_sessions_of_an_idle_vm).long(),
    test!(thousand_sessions_of_a_running_vm).long(),
    test!(thousand_sessions_through_the_device).long(),
    test!(of_concurrent_hooks_exactly_one_wins).long(),
    test!(concurrent_unhooks_all_succeed).long(),
    test!(hooks_and_unhooks_may_race).long(),
    test!(unhook_may_come_while_the_tool_floods).long(),
    test!(hook_and_unhook_may_race_with_new_vcpus).long(),
    test!(preunhook_and_unhook_may_race).long(),
    test!(many_vms_may_be_hooked_at_once).long(),
    test!(tool_may_be_killed_at_any_moment).long().destructive(),
    test!(vmm_may_be_killed_at_any_moment).long().destructive(),
];

fn thousand_sessions_of_an_idle_vm(ctx: &Ctx) {
    let vm = TestVm::new();
    for _ in 0..ctx.rounds(1000) {
        let tool = vm.hook();
        vm.unhook();
        drop(tool);
    }
    vm.expect_usable();
}

fn thousand_sessions_of_a_running_vm(ctx: &Ctx) {
    let vm = TestVm::counting(2);
    for round in 0..ctx.rounds(1000) {
        let mut tool = vm.hook_allowing_all();
        // Some sessions are used, some end as soon as they have begun.
        if round % 2 == 0 {
            assert_eq!(tool.info().vcpu_count, 2);
        }
        if round % 3 == 0 {
            drop(tool);
            vm.unhook();
        } else {
            vm.unhook();
            tool.expect_closed();
        }
        if round % 100 == 0 {
            vm.expect_progress();
        }
    }
    vm.expect_usable();
}

fn thousand_sessions_through_the_device(ctx: &Ctx) {
    let vm = TestVm::counting(1);
    for round in 0..ctx.rounds(1000) {
        let (dev, mut tool) = device::attach(&vm);
        if round % 2 == 0 {
            assert_eq!(sys::unhook(&dev), Ok(()));
            tool.expect_closed();
        }
        promptly("close", || drop(dev));
        tool.drain();
    }
    vm.expect_usable();
}

fn of_concurrent_hooks_exactly_one_wins(ctx: &Ctx) {
    const THREADS: usize = 4;
    let vm = TestVm::counting(1);
    for round in 0..ctx.rounds(200) {
        let barrier = Barrier::new(THREADS);
        let contender = || {
            let tool = Tool::new();
            let dev = sys::open_dev();
            barrier.wait();
            // Both ways to hook compete, too.
            let hooked = if round % 2 == 0 {
                sys::hook(&vm, tool.vmm_fd())
            } else {
                sys::attach(&dev, vm.raw_fd(), tool.vmm_fd())
            };
            (hooked, tool, dev)
        };
        let mut contenders = scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(contender)).collect();
            let ends = threads.into_iter().map(|thread| thread.join());
            ends.collect::<Result<Vec<_>, _>>()
                .expect("no thread panics")
        });
        let winner = contenders.iter().position(|(hooked, ..)| hooked.is_ok());
        let (_, mut tool, _dev) = contenders.swap_remove(winner.expect("one wins"));
        for (hooked, ..) in contenders {
            assert_eq!(hooked, Err(Errno::EXIST));
        }
        assert_eq!(tool.version().version, 1);
        vm.unhook();
        tool.expect_closed();
    }
    vm.expect_usable();
}

fn concurrent_unhooks_all_succeed(ctx: &Ctx) {
    const THREADS: usize = 4;
    let vm = TestVm::counting(1);
    for _ in 0..ctx.rounds(200) {
        let mut tool = vm.hook_allowing_all();
        let barrier = Barrier::new(THREADS);
        scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    barrier.wait();
                    vm.unhook();
                    // When any of them returns, the VM is unhooked.
                    assert_eq!(sys::command(&vm, 1, -1), Err(Errno::FAULT));
                });
            }
        });
        tool.expect_closed();
    }
    vm.expect_usable();
}

fn hooks_and_unhooks_may_race(ctx: &Ctx) {
    let vm = TestVm::counting(1);
    let rounds = ctx.rounds(200);
    // Returns how often it has lost before it had won often enough.
    let hooker = || {
        let (mut won, mut lost) = (0, 0);
        while won < rounds {
            let tool = Tool::new();
            match sys::hook(&vm, tool.vmm_fd()) {
                Ok(()) => won += 1,
                Err(Errno::EXIST) => {
                    lost += 1;
                    yield_now();
                }
                Err(error) => panic!("HOOK: {error}"),
            }
        }
        lost
    };
    let done = AtomicBool::new(false);
    let unhooker = || {
        while !done.load(Ordering::SeqCst) {
            vm.unhook();
        }
    };
    let masker = || {
        while !done.load(Ordering::SeqCst) {
            let masked = [sys::command(&vm, 1, -1), sys::event(&vm, 0, 0)];
            for result in masked {
                assert!(matches!(result, Ok(()) | Err(Errno::FAULT)), "{result:?}");
            }
        }
    };
    let lost = scope(|scope| {
        let hookers = [scope.spawn(hooker), scope.spawn(hooker)];
        scope.spawn(unhooker);
        scope.spawn(masker);
        let lost = hookers.map(|thread| thread.join().expect("no thread panics"));
        done.store(true, Ordering::SeqCst);
        lost
    });
    note!("twice {rounds} hooks won; {lost:?} lost");
    vm.unhook();
    vm.expect_usable();
}

fn unhook_may_come_while_the_tool_floods(ctx: &Ctx) {
    let vm = TestVm::counting(1);
    let mut rng = ctx.rng();
    for _ in 0..ctx.rounds(100) {
        let tool = vm.hook_allowing_all();
        scope(|scope| {
            scope.spawn(|| flood(tool));
            rng.pause(Duration::from_millis(20));
            vm.unhook();
        });
    }
    vm.expect_usable();
}

fn hook_and_unhook_may_race_with_new_vcpus(ctx: &Ctx) {
    for _ in 0..ctx.rounds(10) {
        let mut vm = TestVm::counting(1);
        let fd = vm.raw_fd();
        let done = AtomicBool::new(false);
        scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let (dev, tool) = (sys::open_dev(), Tool::new());
                    assert_eq!(sys::attach(&dev, fd, tool.vmm_fd()), Ok(()));
                    promptly("close", || drop(dev));
                }
            });
            for _ in 0..4 {
                vm.start(Guest::Count);
            }
            done.store(true, Ordering::SeqCst);
        });
        let mut tool = vm.hook_allowing_all();
        assert_eq!(tool.info().vcpu_count, 5);
        vm.expect_progress();
        vm.unhook();
    }
}

fn preunhook_and_unhook_may_race(ctx: &Ctx) {
    let vm = TestVm::counting(1);
    for _ in 0..ctx.rounds(200) {
        let mut tool = vm.hook_allowing_all();
        assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
        let barrier = Barrier::new(2);
        scope(|scope| {
            scope.spawn(|| {
                barrier.wait();
                let announced = sys::preunhook(&vm);
                let fine = matches!(announced, Ok(()) | Err(Errno::NOENT | Errno::FAULT));
                assert!(fine, "{announced:?}");
            });
            barrier.wait();
            vm.unhook();
        });
        // At most the event, and whole.
        if let Some(message) = tool.receive() {
            assert_eq!((message.header.id, message.header.seq), (0, 1));
            tool.expect_closed();
        }
    }
    vm.expect_usable();
}

fn many_vms_may_be_hooked_at_once(ctx: &Ctx) {
    let vms: Vec<TestVm> = (0..16).map(|_| TestVm::new()).collect();
    for round in 0..ctx.rounds(20) {
        let mut tools: Vec<Tool> = vms.iter().map(TestVm::hook_allowing_all).collect();
        for (vm, value) in vms.iter().zip(round as u8..) {
            vm.memory.fill(SCRATCH, 64, value);
        }
        for (tool, value) in tools.iter_mut().zip(round as u8..) {
            assert_eq!(tool.read(SCRATCH, 64), Ok(vec![value; 64]));
        }
        for (vm, tool) in vms.iter().zip(&mut tools) {
            vm.unhook();
            tool.expect_closed();
        }
    }
}

/// A time in which a helper process gets to do something, or not quite.
fn random_moment(rng: &mut Rng) {
    rng.pause(Duration::from_millis(50));
}

fn tool_may_be_killed_at_any_moment(ctx: &Ctx) {
    let vm = TestVm::counting(1);
    let mut rng = ctx.rng();
    for round in 0..ctx.rounds(100) {
        let tool = vm.hook_allowing_all();
        let (mut process, _vmm_end) = start_flood(tool);
        random_moment(&mut rng);
        let unhook_first = round % 4 == 3;
        if unhook_first {
            vm.unhook();
        }
        process.kill();
        if !unhook_first {
            let other = Tool::new();
            assert_eq!(sys::hook(&vm, other.vmm_fd()), Err(Errno::EXIST));
            vm.expect_progress();
            vm.unhook();
        }
        let mut tool = vm.hook_allowing_all();
        assert_eq!(tool.info().vcpu_count, 1);
        vm.unhook();
    }
    vm.expect_usable();
}

fn vmm_may_be_killed_at_any_moment(ctx: &Ctx) {
    let mut rng = ctx.rng();
    for _ in 0..ctx.rounds(100) {
        let vmm = Vmm::start(1, 0);
        let (dev, mut tool) = (sys::open_dev(), Tool::new());
        let attached = sys::attach(&dev, vmm.vm_fd(), tool.vmm_fd());
        attached.expect("the VM can be attached");
        sys::allow_all(&dev);
        assert_eq!(tool.info().vcpu_count, 1);
        let Vmm {
            mut process, vm, ..
        } = vmm;
        // From here on, the VM ends with its process.
        drop(vm);
        let flooding = tool.another();
        scope(|scope| {
            scope.spawn(|| flood(flooding));
            rng.pause(Duration::from_millis(20));
            process.kill();
        });
        tool.drain();
        promptly("close", || drop(dev));
    }
    TestVm::counting(1).expect_usable();
}
