// SPDX-License-Identifier: GPL-2.0 OR MIT

//! SINGLESTEP events of instructions that are special in one way or the other: nobody but the CPU
//! could tell.

use iced_x86::code_asm::*;
use kvmi_abi::{
    access::{ALL, R, W},
    guest_event::{Cr, DescriptorRegister},
    Event,
};

use crate::{
    access_tool::{emit, NEXT, TARGET},
    event_code::{add_vcpu, load, load_user, write_cr, write_msr, DATA, USER},
    event_common::{Doing, Wish, STEP},
    event_step::{code_in, expect_trace, hook, trace},
    guest::Mode,
    harness::{note, test, Ctx, Test},
    registers::LSTAR,
    tool::Tool,
    vcpu::{Exit, DEVICE},
    vm::TestVm,
};

const AREA: &str = "event_step_insns";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(repeated_instruction_gets_to_its_end),
    test!(instructions_that_kvm_executes_count),
    test!(instructions_that_userspace_completes_count),
    test!(instruction_behind_a_change_of_the_stack_is_not_lost),
    test!(user_space_and_its_calls_are_stepped),
    test!(other_events_come_before_the_end_of_the_instruction),
    test!(denied_accesses_come_before_the_end_of_the_instruction),
];

fn repeated_instruction_gets_to_its_end(_: &Ctx) {
    const COUNT: u64 = 5;
    let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| {
        emit(code.mov(r8, rdi));
        emit(code.mov(rdi, DATA));
        emit(code.mov(al, 0x5a));
        emit(code.mov(rcx, COUNT));
        emit(code.rep().stosb());
        emit(code.mov(rdi, r8));
    });
    let (rep, behind) = (rips[4], rips[5]);
    let mut tool = hook(&vm);
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    let mut left = vec![];
    loop {
        let event = tool.expect(0, STEP);
        let regs = event.arch.regs;
        if regs.rip == rep || regs.rip == behind {
            left.push(regs.rcx);
        }
        tool.resume(&event);
        if regs.rip == rips[6] {
            break;
        }
    }
    tool.expect_end(&mut vcpu);
    note!("left after each event: {left:?}");
    // One for each iteration. An emulated CPU may need one more to notice that none is left.
    let iterations: Vec<_> = (0..=COUNT).rev().collect();
    left.dedup();
    assert_eq!(left, iterations);
    assert_eq!(vm.memory.read(DATA, 6), [0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0]);
}

fn instructions_that_kvm_executes_count(_: &Ctx) {
    for mode in [Mode::Long, Mode::Protected32, Mode::Real] {
        note!("{mode:?}");
        let mut vm = TestVm::new();
        let mut vcpu = add_vcpu(&mut vm, mode);
        let control = vcpu.sregs().cr0 ^ 1 << 18;
        let rips = load(&vm, &mut vcpu, mode, |code| {
            emit(code.xor(eax, eax));
            emit(code.cpuid());
            emit(code.nop());
            write_msr(code, 0x175, 0x1234_5000);
            emit(code.rdmsr());
            write_cr(code, Cr::Cr0, control);
            emit(code.clts());
            write_cr(code, Cr::Cr3, 0x4000);
            emit(code.wbinvd());
            emit(code.invd());
            emit(code.sgdt(ptr(DATA)));
            emit(code.nop());
        });
        expect_trace(&vm, &mut vcpu, &rips[1..]);
        assert_eq!(vcpu.msr(0x175), 0x1234_5000);
        assert_eq!(vm.record(0).count, 0);
    }
}

fn instructions_that_userspace_completes_count(_: &Ctx) {
    const MMIO: u64 = 0x1000_0000;
    let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| {
        emit(code.nop());
        emit(code.out(0x11, al));
        emit(code.in_(al, 0x12));
        emit(code.mov(rdx, qword_ptr(MMIO)));
        emit(code.mov(byte_ptr(MMIO + 8), 7));
        emit(code.nop());
    });
    let mut tool = hook(&vm);
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    let mut step = |rip: u64| {
        let event = tool.expect(0, STEP);
        assert_eq!(format!("{:#x}", event.arch.regs.rip), format!("{rip:#x}"));
        tool.resume(&event);
    };
    step(rips[1]);
    for (exit, next) in [
        (Exit::Out(0x11), rips[2]),
        (Exit::In(0x12, 1), rips[3]),
        (Exit::MmioRead(MMIO), rips[4]),
        (Exit::MmioWrite(MMIO + 8, 7), rips[5]),
    ] {
        assert_eq!(vcpu.exit(), exit);
        vcpu.run();
        step(next);
    }
    step(rips[6]);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    let regs = vcpu.regs();
    let device = u64::from(DEVICE);
    assert_eq!((regs.rdx, regs.rax & 0xff), (0xd5d5_d5d5_d5d5_d5d5, device));
    tool.settle();
}

fn instruction_behind_a_change_of_the_stack_is_not_lost(_: &Ctx) {
    for mode in [Mode::Long, Mode::Protected32, Mode::Real] {
        note!("{mode:?}");
        let (vm, mut vcpu, rips) = code_in(mode, |code| {
            emit(code.mov(ax, ss));
            emit(code.mov(ss, ax));
            emit(code.nop());
            emit(code.cli());
            emit(code.sti());
            emit(code.nop());
            emit(code.nop());
        });
        expect_trace(&vm, &mut vcpu, &rips[1..]);
        assert_eq!(vm.record(0).count, 0);
    }
}

fn user_space_and_its_calls_are_stepped(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    let kernel = load_user(&vm, &mut vcpu, |code| {
        emit(code.inc(r8));
        emit(code.nop());
    });
    let end = kernel[3];
    let mut tool = hook(&vm);
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    let rips = trace(&mut tool, 0, end);
    // Up to SYSRET; INC, NOP and SYSCALL.
    assert_eq!(rips, [kernel[1], kernel[2], USER, USER + 3, USER + 4, end]);
    tool.expect_end(&mut vcpu);
    let regs = vcpu.regs();
    assert_eq!((regs.rcx, regs.r11 & 0x300), (USER + 6, 0x200));
}

fn other_events_come_before_the_end_of_the_instruction(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    let sregs = vcpu.sregs();
    let lstar = vcpu.msr(LSTAR);
    let rips = load(&vm, &mut vcpu, Mode::Long, |code| {
        write_cr(code, Cr::Cr0, sregs.cr0 ^ 1 << 18);
        write_msr(code, LSTAR, 0xffff_8000_0000_1000);
        emit(code.sgdt(ptr(DATA)));
        emit(code.nop());
    });
    let mut tool = hook(&vm);
    let wishes = [
        Wish::Cr(Cr::Cr0),
        Wish::Msr(LSTAR),
        Wish::Event(Event::Descriptor),
        Wish::Step,
    ];
    tool.run_telling(&mut vcpu, &wishes);
    let write = Doing::Cr {
        cr: Cr::Cr0,
        old: sregs.cr0,
        new: sregs.cr0 ^ 1 << 18,
    };
    let msr = Doing::Msr {
        msr: LSTAR,
        old: lstar,
        new: 0xffff_8000_0000_1000,
    };
    let store = Doing::Descriptor {
        register: DescriptorRegister::Gdtr,
        load: false,
    };
    let order = [
        STEP, write, STEP, STEP, STEP, STEP, msr, STEP, store, STEP, STEP,
    ];
    let mut steps = rips[1..].iter();
    for doing in order {
        let event = tool.expect(0, doing);
        if doing == STEP {
            assert_eq!(Some(&event.arch.regs.rip), steps.next());
        }
        tool.resume(&event);
    }
    assert_eq!(steps.next(), None);
    tool.expect_end(&mut vcpu);
}

fn denied_accesses_come_before_the_end_of_the_instruction(_: &Ctx) {
    let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| {
        emit(code.mov(rsi, TARGET));
        emit(code.mov(r8, rdi));
        emit(code.mov(rdi, NEXT));
        emit(code.movsq());
        emit(code.mov(rdi, r8));
        emit(code.mov(byte_ptr(TARGET), 1));
        emit(code.nop());
    });
    vm.memory.write(TARGET, &[7; 8]);
    let mut tool = hook(&vm);
    tool.deny(TARGET, ALL);
    tool.deny(NEXT, W);
    tool.run_telling(&mut vcpu, &[Wish::Event(Event::Pf), Wish::Step]);
    let mut step = 1..;
    let mut steps = |tool: &mut Tool, count: usize| {
        for nth in step.by_ref().take(count) {
            let event = tool.expect(0, STEP);
            assert_eq!(event.arch.regs.rip, rips[nth]);
            tool.resume(&event);
        }
    };
    steps(&mut tool, 3);
    tool.allow_pfs(0, &[(TARGET, R), (NEXT, W)]);
    steps(&mut tool, 2);
    tool.allow_pfs(0, &[(TARGET, W)]);
    steps(&mut tool, 2);
    tool.expect_end(&mut vcpu);
    assert_eq!(vm.memory.read(NEXT, 8), [7; 8]);
    assert_eq!(vm.memory.read(TARGET, 2), [1, 7]);
}
