// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Random programs: the guest cannot tell from what they do whether a tool is asked about some of
//! their instructions, or told of each.

use iced_x86::code_asm::*;
use kvmi_abi::{arch::Regs, guest_event::Cr, Event};

use crate::{
    access_insns::differences,
    access_tool::{add_code, emit, CODE, NEXT, PLAIN, TARGET},
    event_code::{attempt, faults, is_tcg, survive, write_msr},
    event_common::Wish,
    guest::{Mode, Record, HIGH},
    harness::{note, skip, test, Ctx, Test},
    registers::{LSTAR, RF},
    util::Rng,
    vcpu::Exit,
    vm::{TestVm, PAGE},
};

const AREA: &str = "event_corpus";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(programs_do_the_same_if_the_tool_is_asked).long(),
    test!(programs_do_the_same_if_they_are_stepped).long(),
    test!(traced_programs_do_the_same_if_they_are_stepped).long(),
];

/// What programs write to, and their stack.
const DATA: u64 = TARGET;
const STACK: u64 = NEXT;
/// Pieces of a program.
const PIECES: usize = 40;
/// Registers that are for any purpose; RSI, RDI, RBP, RSP and R15 have their own.
const REGISTERS: [AsmRegister64; 11] = [rax, rcx, rdx, rbx, r8, r9, r10, r11, r12, r13, r14];

/// What is left of a run.
#[derive(Debug)]
struct Outcome {
    regs: Regs,
    data: Vec<u8>,
    stack: Vec<u8>,
    record: Record,
    faults: u32,
    events: u64,
}

/// Writes a program of some pieces.
fn program(code: &mut CodeAssembler, rng: &mut Rng) {
    emit(code.mov(rsi, DATA));
    emit(code.mov(rsp, STACK + 0x800));
    for register in REGISTERS {
        emit(code.mov(register, rng.next()));
    }
    for _ in 0..PIECES {
        match rng.below(16) {
            0..=3 => compute(code, rng),
            4 | 5 => access(code, rng),
            6 => flags(code, rng),
            7 | 8 => branch(code, rng),
            9 => repeat(code, rng),
            10 | 11 => except(code, rng),
            12 => interruptible(code, rng),
            13 => system(code, rng),
            14 => back(code),
            _ => float(code, rng),
        }
    }
    // All flags, of which QEMU's CPU keeps odd bits otherwise.
    emit(code.cmp(rax, rdx));
}

fn compute(code: &mut CodeAssembler, rng: &mut Rng) {
    let (one, other) = (rng.pick(&REGISTERS), rng.pick(&REGISTERS));
    // Lossless: it is below 2³¹.
    let number = rng.below(1 << 31) as i32;
    emit(match rng.below(12) {
        0 => code.add(one, other),
        1 => code.sub(one, other),
        2 => code.xor(one, other),
        3 => code.and(one, number),
        4 => code.or(one, number),
        5 => code.imul_2(one, other),
        6 => code.rol(one, 7),
        7 => code.bswap(one),
        8 => code.lea(one, qword_ptr(one + other * 4 + 5)),
        9 => code.xchg(one, other),
        10 => code.not(one),
        _ => code.mov(one, other),
    });
}

fn access(code: &mut CodeAssembler, rng: &mut Rng) {
    let register = rng.pick(&REGISTERS);
    let at = rsi + 8 * rng.below(64);
    match rng.below(7) {
        0 => emit(code.mov(register, qword_ptr(at))),
        1 => emit(code.mov(qword_ptr(at), register)),
        2 => emit(code.lock().xadd(qword_ptr(at), register)),
        3 => emit(code.lock().cmpxchg(qword_ptr(at), register)),
        4 => emit(code.add(qword_ptr(at), register)),
        5 => emit(code.xchg(qword_ptr(at), register)),
        _ => {
            emit(code.push(register));
            emit(code.pop(qword_ptr(at)));
        }
    }
}

fn flags(code: &mut CodeAssembler, rng: &mut Rng) {
    let register = rng.pick(&REGISTERS);
    // All flags are defined.
    emit(code.cmp(register, 5));
    emit(code.pushfq());
    emit(code.pop(register));
    emit(code.or(register, rng.pick(&[1, 0x40, 0x800, 0xc5])));
    emit(code.push(register));
    emit(code.popfq());
    emit(code.pushfq());
    emit(code.pop(qword_ptr(rsi + 0x300)));
}

fn branch(code: &mut CodeAssembler, rng: &mut Rng) {
    let register = rng.pick(&REGISTERS);
    let mut to = code.create_label();
    match rng.below(4) {
        0 => {
            emit(code.cmp(register, 77));
            emit(code.jbe(to));
            emit(code.inc(register));
            emit(code.set_label(&mut to));
        }
        1 => {
            emit(code.mov(register, 3u64));
            emit(code.set_label(&mut to));
            emit(code.add(qword_ptr(rsi), register));
            emit(code.dec(register));
            emit(code.jne(to));
        }
        2 => {
            emit(code.mov(ecx, 3));
            emit(code.set_label(&mut to));
            emit(code.inc(r8));
            emit(code.loop_(to));
        }
        _ => {
            let mut over = code.create_label();
            emit(code.call(to));
            emit(code.jmp(over));
            emit(code.set_label(&mut to));
            emit(code.enter(16, 0));
            emit(code.mov(qword_ptr(rbp - 8), register));
            emit(code.leave());
            emit(code.ret());
            emit(code.set_label(&mut over));
        }
    }
    emit(code.nop());
}

fn repeat(code: &mut CodeAssembler, rng: &mut Rng) {
    // The handlers need RDI.
    emit(code.mov(r15, rdi));
    emit(code.lea(rdi, qword_ptr(rsi + 0x400)));
    emit(code.mov(rcx, rng.below(9) as u64));
    match rng.below(4) {
        0 => emit(code.rep().stosb()),
        1 => emit(code.rep().movsb()),
        2 => emit(code.rep().movsq()),
        _ => emit(code.repe().cmpsb()),
    }
    emit(code.mov(rsi, DATA));
    emit(code.mov(rdi, r15));
    emit(code.cmp(rcx, 0));
}

fn except(code: &mut CodeAssembler, rng: &mut Rng) {
    match rng.below(6) {
        0 => emit(code.int3()),
        1 => emit(code.int(9)),
        2 => attempt(code, |code| emit(code.ud2())),
        3 => attempt(code, |code| {
            emit(code.xor(ecx, ecx));
            emit(code.xor(edx, edx));
            emit(code.div(ecx));
        }),
        4 => attempt(code, |code| {
            // Not canonical.
            emit(code.mov(rax, 1u64 << 60));
            emit(code.mov(rax, qword_ptr(rax)));
        }),
        _ => attempt(code, |code| {
            // Not mapped.
            emit(code.mov(rax, HIGH + PAGE as u64));
            emit(code.mov(rax, qword_ptr(rax)));
        }),
    }
    emit(code.inc(r9));
}

fn interruptible(code: &mut CodeAssembler, rng: &mut Rng) {
    if rng.one_in(2) {
        emit(code.mov(ax, ss));
        emit(code.mov(ss, ax));
    } else {
        emit(code.cli());
        emit(code.sti());
    }
    emit(code.inc(r10));
    emit(code.inc(r11));
}

fn system(code: &mut CodeAssembler, rng: &mut Rng) {
    match rng.below(7) {
        0 => {
            emit(code.mov(eax, 0));
            emit(code.cpuid());
        }
        1 => {
            emit(code.mov(rax, cr0));
            emit(code.xor(rax, 1 << 18));
            emit(code.mov(cr0, rax));
        }
        2 => {
            // The same tables, cached otherwise.
            emit(code.mov(rax, cr3));
            emit(code.xor(rax, 8));
            emit(code.mov(cr3, rax));
        }
        3 => {
            emit(code.mov(rax, cr4));
            emit(code.xor(rax, 1 << 2));
            emit(code.mov(cr4, rax));
        }
        4 => {
            write_msr(code, LSTAR, rng.next() >> 20);
            emit(code.rdmsr());
        }
        5 => {
            emit(code.sgdt(ptr(rsi + 0x700)));
            emit(code.lgdt(ptr(rsi + 0x700)));
            emit(code.sidt(ptr(rsi + 0x710)));
            emit(code.lidt(ptr(rsi + 0x710)));
            emit(code.str(ax));
        }
        _ => {
            emit(code.mov(rax, dr7));
            emit(code.mov(dr7, rax));
            emit(code.invlpg(byte_ptr(rsi)));
        }
    }
}

/// IRET to the next instruction.
fn back(code: &mut CodeAssembler) {
    let mut after = code.create_label();
    emit(code.mov(rcx, rsp));
    emit(code.mov(eax, ss));
    emit(code.push(rax));
    emit(code.push(rcx));
    emit(code.push(0x202));
    emit(code.mov(eax, cs));
    emit(code.push(rax));
    emit(code.lea(rax, qword_ptr(after)));
    emit(code.push(rax));
    emit(code.iretq());
    emit(code.set_label(&mut after));
    emit(code.inc(r8));
}

fn float(code: &mut CodeAssembler, rng: &mut Rng) {
    let at = rsi + 0x780 + 8 * rng.below(8);
    emit(code.cvtsi2sd(xmm3, rng.pick(&REGISTERS)));
    emit(code.mulsd(xmm3, xmm3));
    emit(code.movsd_2(qword_ptr(at), xmm3));
    emit(code.fninit());
    emit(code.fldpi());
    emit(code.fstp(qword_ptr(at + 64)));
}

/// Runs the program of a seed. Without wishes, nobody is told anything.
#[track_caller]
fn run(seed: u64, tf: bool, wishes: &[Wish]) -> Outcome {
    let mut vm = TestVm::new();
    let mut rng = Rng::new(seed);
    let mut vcpu = add_code(&mut vm, CODE, |code| program(code, &mut rng));
    for vector in [0, 6, 13, 14] {
        survive(&vm, &mut vcpu, Mode::Long, vector);
    }
    vm.memory.write(DATA, &Rng::new(seed).bytes(PAGE));
    vm.memory.write(PLAIN, &[0x11; 256]);
    if tf {
        vcpu.change_regs(|regs| regs.rflags |= 0x100);
    }
    let mut events = 0;
    if wishes.is_empty() {
        assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10), "seed {seed:#x}");
    } else {
        let mut tool = vm.hook_allowing_all();
        let steps = tool.version().features.singlestep != 0;
        if !steps && wishes.iter().any(|wish| matches!(wish, Wish::Step)) {
            skip("the CPU cannot single-step");
        }
        tool.run_telling(&mut vcpu, wishes);
        events = tool.let_all_pass(&mut vcpu);
        tool.expect_end(&mut vcpu);
    }
    let mut regs = vcpu.regs();
    regs.rflags &= !RF;
    Outcome {
        regs,
        data: vm.memory.read(DATA, PAGE),
        stack: vm.memory.read(STACK, PAGE),
        record: vm.record(0),
        faults: faults(&vm),
        events,
    }
}

/// Runs random programs with and without a tool; returns how many events there were.
#[track_caller]
fn expect_same(ctx: &Ctx, programs: u32, tf: bool, wishes: &[Wish]) -> u64 {
    let mut rng = ctx.rng();
    let mut events = 0;
    for _ in 0..ctx.rounds(programs) {
        let seed = rng.next();
        let free = run(seed, tf, &[]);
        let told = run(seed, tf, wishes);
        let what = format!("program {seed:#x}");
        assert_eq!(
            format!("{:#x?}", told.regs),
            format!("{:#x?}", free.regs),
            "{what}"
        );
        assert_eq!(told.record, free.record, "{what}");
        assert_eq!(told.faults, free.faults, "{what}");
        assert_eq!(differences(&free.data, &told.data), [], "{what}");
        assert_eq!(differences(&free.stack, &told.stack), [], "{what}");
        events += told.events;
    }
    note!("{events} events");
    events
}

fn programs_do_the_same_if_the_tool_is_asked(ctx: &Ctx) {
    let [one, three, four] = Cr::ALL.map(Wish::Cr);
    let msr = Wish::Msr(LSTAR);
    let [tables, breakpoint, call] =
        [Event::Descriptor, Event::Breakpoint, Event::Hypercall].map(Wish::Event);
    for wishes in [
        &[one, three, four][..],
        &[msr],
        &[tables],
        &[breakpoint],
        &[one, three, four, msr, tables, breakpoint, call],
    ] {
        note!("{wishes:?}");
        expect_same(ctx, 40, false, wishes);
    }
}

fn programs_do_the_same_if_they_are_stepped(ctx: &Ctx) {
    const PROGRAMS: u32 = 60;
    let events = expect_same(ctx, PROGRAMS, false, &[Wish::Step]);
    // One for each piece, at least.
    assert!(events >= (ctx.rounds(PROGRAMS) * PIECES) as u64);
}

fn traced_programs_do_the_same_if_they_are_stepped(ctx: &Ctx) {
    if is_tcg() {
        // It is the emulator of KVM that executes an STI then, and does trap.
        skip("QEMU's CPU does not trap behind an STI");
    }
    expect_same(ctx, 20, true, &[Wish::Step]);
}
