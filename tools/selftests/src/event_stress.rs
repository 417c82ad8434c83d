// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Guest events of several vCPUs at once, with everything else going on: each is told, once, in
//! order.

use iced_x86::code_asm::*;
use kvmi_abi::{
    guest_event::{Cr, DescriptorRegister},
    id::VCPU_EVENT,
    Command, Event,
};

use crate::{
    access_tool::emit,
    event_code::{add_vcpu, is_amd, load, write_cr, write_msr, DATA},
    event_common::{Doing, Wish},
    event_hypercall::call,
    guest::{Mode, PML4, STOP},
    harness::{test, Ctx, Test},
    registers::LSTAR,
    tool::Tool,
    util::Rng,
    vcpu::{Exit, Vcpu},
    vcpu_tool::{Ledger, Paused},
    vm::{TestVm, PAGE, SCRATCH},
};

const AREA: &str = "event_stress";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(events_of_all_vcpus_are_exact).long(),
    test!(commands_and_pauses_disturb_no_event).long(),
    test!(signals_lose_no_event).long(),
    test!(changes_of_mind_lose_no_write).long(),
];

/// A copy of the page tables.
const OTHER_TABLES: u64 = SCRATCH;
const ONE: u64 = 0xffff_8000_0000_1000;
const TWO: u64 = 0xffff_8000_0000_2000;

/// What a vCPU does again and again.
const ROUND: [Doing; 6] = [
    tables(PML4, OTHER_TABLES),
    entry(TWO, ONE),
    Doing::Descriptor {
        register: DescriptorRegister::Idtr,
        load: false,
    },
    tables(OTHER_TABLES, PML4),
    Doing::Hypercall,
    entry(ONE, TWO),
];

const WISHES: [Wish; 4] = [
    Wish::Cr(Cr::Cr3),
    Wish::Msr(LSTAR),
    Wish::Event(Event::Descriptor),
    Wish::Event(Event::Hypercall),
];

const fn tables(old: u64, new: u64) -> Doing {
    Doing::Cr {
        cr: Cr::Cr3,
        old,
        new,
    }
}

const fn entry(old: u64, new: u64) -> Doing {
    Doing::Msr {
        msr: LSTAR,
        old,
        new,
    }
}

/// As many vCPUs as the emulated host has for guests.
fn vcpus() -> u16 {
    if is_amd() {
        4
    } else {
        2
    }
}

/// A VM with vCPUs that do all of [`ROUND`] so often, or until [`STOP`] is set, and look whether it
/// has an effect. Results of calls add up in R14.
fn busy(rounds: u64) -> (TestVm, Vec<Vcpu>) {
    let mut vm = TestVm::new();
    vm.memory.write(OTHER_TABLES, &vm.memory.read(PML4, PAGE));
    let mut vcpus: Vec<_> = (0..vcpus())
        .map(|_| add_vcpu(&mut vm, Mode::Long))
        .collect();
    for vcpu in &mut vcpus {
        load(&vm, vcpu, Mode::Long, |code| {
            let mut again = code.create_label();
            let mut fail = code.create_label();
            let mut end = code.create_label();
            emit(code.mov(r13, rounds));
            emit(code.xor(r14, r14));
            emit(code.set_label(&mut again));
            for (tables, value) in [(OTHER_TABLES, ONE), (PML4, TWO)] {
                write_cr(code, Cr::Cr3, tables);
                emit(code.mov(rdx, cr3));
                emit(code.cmp(rdx, rax));
                emit(code.jne(fail));
                if value == ONE {
                    write_msr(code, LSTAR, value);
                    emit(code.sidt(ptr(DATA)));
                } else {
                    call(code);
                    emit(code.add(r14, rax));
                    write_msr(code, LSTAR, value);
                }
                // Lossless: it is the lower half.
                let half = (value & 0xffff_ffff) as u32;
                emit(code.xor(eax, eax));
                emit(code.mov(ecx, LSTAR));
                emit(code.rdmsr());
                emit(code.cmp(eax, half as i32));
                emit(code.jne(fail));
            }
            emit(code.inc(dword_ptr(rbx)));
            emit(code.cmp(byte_ptr(STOP), 0));
            emit(code.jne(end));
            emit(code.dec(r13));
            emit(code.jne(again));
            emit(code.jmp(end));
            emit(code.set_label(&mut fail));
            emit(code.out(0x13, al));
            emit(code.set_label(&mut end));
        });
        vcpu.set_msrs(&[(LSTAR, TWO)]);
    }
    (vm, vcpus)
}

/// A tool that checks the order of what it is told, and disturbs at random if it has got random
/// numbers.
struct Watcher {
    tool: Tool,
    ledger: Ledger,
    /// How many events of each vCPU there were.
    told: Vec<usize>,
    /// Pauses that were asked for, and how many of them there were.
    asked: usize,
    paused: usize,
    rng: Option<Rng>,
}

impl Watcher {
    /// Has all vCPUs run, and is told of all that they do.
    #[track_caller]
    fn start(vm: &TestVm, vcpus: &mut [Vcpu], rng: Option<Rng>) -> Self {
        let mut tool = vm.hook_allowing_all();
        let mut ledger = Ledger::default();
        for vcpu in vcpus.iter() {
            for (command, seq) in tool.send_wishes(vcpu.index, &WISHES) {
                ledger.sent(Some(vcpu.index), command.id(), seq);
            }
        }
        tool.settle();
        vcpus.iter_mut().for_each(Vcpu::run_through);
        Self {
            tool,
            ledger,
            told: vec![0; vcpus.len()],
            asked: 0,
            paused: 0,
            rng,
        }
    }

    /// Receives messages until each vCPU was told to go on after so many rounds; calls `after` after
    /// each event.
    #[track_caller]
    fn watch(&mut self, rounds: u64, mut after: impl FnMut()) {
        let all = rounds as usize * ROUND.len() * self.told.len();
        while self.told.iter().sum::<usize>() < all {
            self.receive();
            after();
        }
        // What was asked for late may have come to a vCPU that does not run any more.
        assert!(self.paused <= self.asked);
    }

    #[track_caller]
    fn receive(&mut self) {
        let message = self.tool.next();
        if message.header.id != VCPU_EVENT {
            self.ledger.replied(&message.header);
            assert!(message.reply().is_ok());
            return;
        }
        let event = Paused::from(&message);
        if event.event == Event::Pause {
            self.paused += 1;
        } else {
            let told = &mut self.told[usize::from(event.vcpu)];
            let expected = ROUND[*told % ROUND.len()];
            assert_eq!(
                event.doing,
                Some(expected),
                "event {told} of {}",
                event.vcpu
            );
            *told += 1;
        }
        self.disturb(event.vcpu);
        self.tool.resume(&event);
    }

    /// Has this vCPU, which waits, do something else.
    fn disturb(&mut self, vcpu: u16) {
        let Some(rng) = &mut self.rng else { return };
        if self.ledger.len() > 8 {
            return;
        }
        match rng.below(6) {
            0 => {
                let seq = self.tool.send_pause(vcpu, rng.one_in(2));
                self.ledger.sent(None, Command::VmPauseVcpu.id(), seq);
                self.asked += 1;
            }
            1 | 2 => {
                let id = rng.pick(&[
                    Command::VcpuGetRegisters,
                    Command::VcpuGetXcr,
                    Command::VcpuGetXsave,
                    Command::VcpuGetInfo,
                ]);
                let seq = self.tool.send_to(vcpu, id, &[]);
                self.ledger.sent(Some(vcpu), id.id(), seq);
            }
            3 => {
                let seq = self.tool.send(Command::VmGetInfo.id(), &[]);
                self.ledger.sent(None, Command::VmGetInfo.id(), seq);
            }
            _ => {}
        }
    }
}

/// Fails the test unless all vCPUs get to their end, and all calls of theirs have succeeded.
#[track_caller]
fn expect_done(vm: &TestVm, vcpus: &mut [Vcpu], rounds: u64) {
    for vcpu in vcpus {
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        assert_eq!(vm.count(vcpu.index.into()), rounds as u32);
        assert_eq!((vcpu.sregs().cr3, vcpu.msr(LSTAR)), (PML4, TWO));
        assert_eq!(vm.record(vcpu.index.into()).count, 0);
    }
}

fn events_of_all_vcpus_are_exact(ctx: &Ctx) {
    let rounds = ctx.rounds(200) as u64;
    let (vm, mut vcpus) = busy(rounds);
    let mut watcher = Watcher::start(&vm, &mut vcpus, None);
    watcher.watch(rounds, || ());
    expect_done(&vm, &mut vcpus, rounds);
    watcher.tool.settle();
    for vcpu in &mut vcpus {
        assert_eq!(vcpu.regs().r14, 0, "a call has failed");
    }
}

fn commands_and_pauses_disturb_no_event(ctx: &Ctx) {
    let rounds = ctx.rounds(100) as u64;
    let (vm, mut vcpus) = busy(rounds);
    let mut watcher = Watcher::start(&vm, &mut vcpus, Some(ctx.rng()));
    watcher.watch(rounds, || ());
    // A vCPU that was paused at the end still waits.
    drop(watcher);
    expect_done(&vm, &mut vcpus, rounds);
}

fn signals_lose_no_event(ctx: &Ctx) {
    let rounds = ctx.rounds(100) as u64;
    let (vm, mut vcpus) = busy(rounds);
    let mut watcher = Watcher::start(&vm, &mut vcpus, None);
    let mut rng = ctx.rng();
    watcher.watch(rounds, || {
        // In the middle of a wait, when the decision is carried out, or anywhere else.
        let vcpu = rng.below(vcpus.len());
        vcpus[vcpu].signal();
    });
    expect_done(&vm, &mut vcpus, rounds);
    watcher.tool.settle();
}

fn changes_of_mind_lose_no_write(ctx: &Ctx) {
    let (vm, mut vcpus) = busy(u64::MAX);
    vcpus.iter_mut().for_each(Vcpu::run_through);
    let mut tool = vm.hook_allowing_all();
    let mut rng = ctx.rng();
    let mut ledger = Ledger::default();
    for _ in 0..ctx.rounds(2000) {
        let vcpu = rng.below(vcpus.len()) as u16;
        let wish = rng.pick(&WISHES);
        for (command, seq) in tool.send_wish(vcpu, wish, rng.one_in(2)) {
            ledger.sent(Some(vcpu), command.id(), seq);
        }
        while ledger.len() > 16 || tool.readable() != 0 {
            let message = tool.next();
            if message.header.id == VCPU_EVENT {
                let event = Paused::from(&message);
                tool.resume(&event);
            } else {
                ledger.replied(&message.header);
                assert!(message.reply().is_ok());
            }
        }
    }
    // From here on, nobody is asked.
    drop(tool);
    vm.memory.write(STOP, &[1]);
    for vcpu in &mut vcpus {
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        assert_eq!((vcpu.sregs().cr3, vcpu.msr(LSTAR)), (PML4, TWO));
        assert_eq!(vm.record(vcpu.index.into()).count, 0);
    }
}
