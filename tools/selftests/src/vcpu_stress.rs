// SPDX-License-Identifier: GPL-2.0 OR MIT

//! vCPUs that are paused, asked, signalled and unhooked at random moments.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread::scope,
    time::Duration,
};

use kvmi_abi::{
    id::VCPU_EVENT,
    vcpu::{GetCpuid, GetMtrrType, PauseVcpu, TranslateGva},
    Command, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    harness::{note, test, Ctx, Test},
    memory::Memory,
    role::{flood, Vmm},
    sys,
    tool::Tool,
    util::{promptly, shortly, within, Rng},
    vcpu_tool::{exception, vcpu_payload, Ledger, Paused},
    vm::{Guest, TestVm, PAGE},
};

const AREA: &str = "vcpu_stress";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(one_vcpu_under_all_kinds_of_load).long(),
    test!(four_vcpus_under_all_kinds_of_load).long(),
    test!(pauses_and_unhook_may_race).long(),
    test!(pauses_and_signals_may_race).long(),
    test!(large_replies_of_two_vcpus_are_never_mixed_up).long(),
    test!(vmm_may_be_killed_at_any_moment).long().destructive(),
];

/// A tool that does everything that a guest survives, in random order, and checks the order of the
/// replies.
struct Load<'a> {
    tool: Tool,
    rng: Rng,
    vcpus: u16,
    /// Whether the guests survive exceptions.
    inject: bool,
    ledger: Ledger,
    events: Vec<Paused>,
    done: &'a AtomicUsize,
}

impl<'a> Load<'a> {
    fn new(tool: Tool, rng: Rng, vcpus: u16, done: &'a AtomicUsize) -> Self {
        Self {
            tool,
            rng,
            vcpus,
            inject: true,
            ledger: Ledger::default(),
            events: vec![],
            done,
        }
    }

    /// Works until the connection is closed, or this many steps.
    fn work(&mut self, steps: usize) {
        for _ in 0..steps {
            let alive = match self.rng.below(8) {
                0..=3 if self.ledger.len() < 12 => self.send(),
                4 => self.reply(),
                _ if self.ledger.is_empty() => true,
                _ => self.receive(),
            };
            if !alive {
                return;
            }
        }
    }

    /// Gives a command; returns whether the connection is open.
    fn send(&mut self) -> bool {
        let rng = &mut self.rng;
        let vcpu = rng.below(self.vcpus.into()) as u16;
        let held = self.events.iter().find(|event| event.vcpu == vcpu);
        let number = rng.next();
        let (command, request) = match rng.below(12) {
            0 | 1 => {
                let pause = PauseVcpu {
                    vcpu,
                    wait: rng.below(2) as u8,
                    ..Default::default()
                };
                (Command::VmPauseVcpu, pause.as_bytes().to_vec())
            }
            2 => (Command::VmGetInfo, vec![]),
            3 if self.inject => {
                let nr = rng.pick(&[0, 6, 13, 14, 17]);
                let exception = exception(nr, 2, number);
                (Command::VcpuInjectException, exception.as_bytes().to_vec())
            }
            4 => match held {
                Some(event) => {
                    let regs = event.arch.regs.as_bytes().to_vec();
                    (Command::VcpuSetRegisters, regs)
                }
                None => (Command::VcpuGetXsave, vec![]),
            },
            5 => (Command::VcpuGetXcr, vec![]),
            6 => {
                let leaf = GetCpuid::default();
                (Command::VcpuGetCpuid, leaf.as_bytes().to_vec())
            }
            7 => {
                let address = TranslateGva { gva: number };
                (Command::VcpuTranslateGva, address.as_bytes().to_vec())
            }
            8 => {
                let address = GetMtrrType { gpa: number >> 30 };
                (Command::VcpuGetMtrrType, address.as_bytes().to_vec())
            }
            9 => (Command::VcpuGetInfo, vec![]),
            _ => (Command::VcpuGetRegisters, vec![]),
        };
        let of_vm = matches!(command, Command::VmPauseVcpu | Command::VmGetInfo);
        let sent = if of_vm {
            self.tool.try_send(command.id(), &request)
        } else {
            let payload = vcpu_payload(vcpu, &request);
            self.tool.try_send(command.id(), &payload)
        };
        let Ok(seq) = sent else { return false };
        self.ledger
            .sent((!of_vm).then_some(vcpu), command.id(), seq);
        true
    }

    /// Replies to an event, if there is one.
    fn reply(&mut self) -> bool {
        if self.events.is_empty() {
            return true;
        }
        let event = self.events.swap_remove(self.rng.below(self.events.len()));
        let reply = event.reply(0);
        let message = crate::tool::message(VCPU_EVENT, event.seq, reply.as_bytes());
        self.tool.try_send_raw(&message).is_ok()
    }

    /// Receives a message; returns whether the connection is open.
    fn receive(&mut self) -> bool {
        let Some(message) = self.tool.receive() else {
            return false;
        };
        self.done.fetch_add(1, Ordering::Relaxed);
        if message.header.id == VCPU_EVENT {
            let event = Paused::from(&message);
            let same = self.events.iter().any(|held| held.vcpu == event.vcpu);
            assert!(!same, "two events of vCPU {} at once", event.vcpu);
            self.events.push(event);
            return true;
        }
        let header = message.header;
        self.ledger.replied(&header);
        let reply = message.reply();
        let refusal = match Command::from_id(header.id) {
            Some(Command::VcpuInjectException) => Some(KvmiError::Busy),
            // Not every VM here was given CPUID leaves.
            Some(Command::VcpuGetCpuid) => Some(KvmiError::NoEnt),
            _ => None,
        };
        let fine = reply.is_ok() || reply.as_ref().err() == refusal.as_ref();
        assert!(fine, "{header:?}: {reply:?}");
        true
    }
}

/// Where [`disturb`] has a page of memory now and then.
pub const SLOT_GPA: u64 = 0x1000_0000;

/// Sends signals to vCPU threads, and changes memory slots, each of which may take as long as
/// `limit`, until told to stop.
pub fn disturb(vm: &TestVm, vcpus: usize, rng: &mut Rng, limit: Duration, stop: &AtomicBool) {
    let slot = Memory::new(PAGE);
    while !stop.load(Ordering::SeqCst) {
        vm.signal(rng.below(vcpus));
        if rng.one_in(16) {
            within(limit, "adding a slot", || vm.add_slot(1, SLOT_GPA, &slot));
            within(limit, "removing a slot", || vm.remove_slot(1));
        }
        rng.pause(Duration::from_millis(1));
    }
}

fn all_kinds_of_load(ctx: &Ctx, vcpus: u32) {
    note!("seed {}", ctx.seed());
    let vm = TestVm::running(Guest::Count64, vcpus);
    let mut rng = ctx.rng();
    let messages = AtomicUsize::new(0);
    let rounds = ctx.rounds(200);
    for round in 0..rounds {
        let tool = vm.hook_allowing_all();
        let mut load = Load::new(tool, Rng::new(rng.next()), vcpus as u16, &messages);
        let mut other = Rng::new(rng.next());
        let stop = AtomicBool::new(false);
        scope(|scope| {
            scope.spawn(|| disturb(&vm, vcpus as usize, &mut other, shortly(), &stop));
            // Some sessions end with the tool, some with an UNHOOK in the middle.
            if round % 3 == 0 {
                load.work(rng.below(300));
                drop(load);
                vm.expect_progress();
            } else {
                scope.spawn(move || load.work(usize::MAX));
                rng.pause(Duration::from_millis(40));
            }
            vm.unhook();
            vm.expect_progress();
            stop.store(true, Ordering::SeqCst);
        });
        vm.expect_progress();
    }
    let messages = messages.into_inner();
    note!("{messages} messages in {rounds} sessions");
    assert_ne!(messages, 0);
    vm.expect_usable();
}

fn one_vcpu_under_all_kinds_of_load(ctx: &Ctx) {
    all_kinds_of_load(ctx, 1);
}

fn four_vcpus_under_all_kinds_of_load(ctx: &Ctx) {
    all_kinds_of_load(ctx, 4);
}

fn pauses_and_unhook_may_race(ctx: &Ctx) {
    let vm = TestVm::counting(2);
    let mut rng = ctx.rng();
    for _ in 0..ctx.rounds(300) {
        let mut tool = vm.hook_allowing_all();
        for vcpu in [0, 1, 0, 1] {
            tool.send_pause(vcpu, rng.one_in(2));
        }
        rng.pause(Duration::from_millis(2));
        vm.unhook();
        let (mut replies, mut events) = (0, 0);
        while let Some(message) = tool.receive() {
            if message.header.id == VCPU_EVENT {
                Paused::from(&message);
                events += 1;
            } else {
                assert_eq!(message.reply(), Ok(vec![]));
                replies += 1;
            }
        }
        // Nobody has replied to the first event of either.
        assert!(replies <= 4 && events <= 2, "{replies}, {events}");
        vm.expect_progress();
    }
    vm.expect_usable();
}

fn pauses_and_signals_may_race(ctx: &Ctx) {
    let vm = TestVm::counting(2);
    let mut rng = ctx.rng();
    let mut tool = vm.hook_allowing_all();
    let (mut other, stop) = (Rng::new(rng.next()), AtomicBool::new(false));
    scope(|scope| {
        scope.spawn(|| disturb(&vm, 2, &mut other, shortly(), &stop));
        for nth in 1..=ctx.rounds(1000) {
            let vcpu = rng.below(2) as u16;
            let paused = tool.pause_waiting(vcpu, rng.one_in(2));
            // None is lost, none is repeated.
            assert_eq!(paused.seq as usize, nth);
            let count = vm.count(vcpu.into());
            assert!(tool.vcpu_info(vcpu).is_ok());
            assert_eq!(vm.count(vcpu.into()), count, "the guest runs");
            tool.resume(&paused);
        }
        stop.store(true, Ordering::SeqCst);
    });
    vm.expect_progress();
    vm.unhook();
    vm.expect_usable();
}

fn large_replies_of_two_vcpus_are_never_mixed_up(ctx: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 2);
    let mut tool = vm.hook_allowing_all();
    let mut sender = tool.another();
    let rounds = ctx.rounds(2000) as u32;
    let received = AtomicUsize::new(0);
    scope(|scope| {
        scope.spawn(|| {
            for nth in 0..rounds {
                while nth as usize - received.load(Ordering::SeqCst) >= 16 {
                    std::thread::yield_now();
                }
                let payload = vcpu_payload((nth % 2) as u16, &[]);
                let sent = sender.try_send(Command::VcpuGetXsave.id(), &payload);
                sent.expect("the host takes messages");
            }
        });
        // Replies of several pages from two vCPU threads are never mixed up.
        let mut last = [0; 2];
        for _ in 0..rounds {
            let message = tool.next();
            let seq = message.header.seq;
            let of = (seq % 2) as usize;
            assert!(seq > last[of], "{seq} after {}", last[of]);
            last[of] = seq;
            assert_eq!(message.reply().map(|data| data.len()), Ok(4096));
            received.fetch_add(1, Ordering::SeqCst);
        }
    });
    vm.expect_progress();
}

fn vmm_may_be_killed_at_any_moment(ctx: &Ctx) {
    let mut rng = ctx.rng();
    let messages = AtomicUsize::new(0);
    for round in 0..ctx.rounds(60) {
        let Vmm {
            mut process, vm, ..
        } = Vmm::start(2, 0);
        let vm = vm.expect("the VM is open");
        let (dev, tool) = (sys::open_dev(), Tool::new());
        let fd = std::os::fd::AsRawFd::as_raw_fd(&vm);
        sys::attach(&dev, fd, tool.vmm_fd()).expect("the VM can be attached");
        sys::allow_all(&dev);
        drop(vm);
        let (flooding, seed) = (tool.another(), rng.next());
        let mut load = Load::new(tool, Rng::new(seed), 2, &messages);
        // They are in real mode.
        load.inject = false;
        scope(|scope| {
            if round % 2 == 0 {
                scope.spawn(|| flood(flooding));
            } else {
                scope.spawn(|| load.work(usize::MAX));
            }
            rng.pause(Duration::from_millis(30));
            process.kill();
        });
        promptly("close", || drop(dev));
    }
    TestVm::counting(1).expect_usable();
}
