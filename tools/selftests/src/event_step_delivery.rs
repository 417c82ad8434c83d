// SPDX-License-Identifier: GPL-2.0 OR MIT

//! SINGLESTEP events and what interrupts the guest meanwhile: exceptions, interrupts, halts.

use iced_x86::code_asm::*;

use crate::{
    access_tool::emit,
    event_code::{add_vcpu, attempt, faults, handler, load, survive, write_msr},
    event_common::Wish,
    event_step::{code_in, hook, nops, trace},
    guest::{Mode, HIGH},
    harness::{note, test, Ctx, Test},
    vcpu::{Exit, Vcpu},
    vm::TestVm,
};

const AREA: &str = "event_step_delivery";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(exceptions_lead_to_their_handlers),
    test!(interrupt_waits_for_a_few_instructions),
    test!(nmi_is_delivered),
    test!(halted_vcpu_goes_on),
];

const VECTOR: u8 = 31;
const NOPS: usize = 40;

/// Writes code that causes an exception.
type Cause = fn(&mut CodeAssembler);

/// Vectors of exceptions, and their causes.
const EXCEPTIONS: [(u8, Cause); 6] = [
    (0, |code| {
        emit(code.xor(edx, edx));
        emit(code.xor(ecx, ecx));
        emit(code.div(ecx));
    }),
    (3, |code| emit(code.int3())),
    (6, |code| emit(code.ud2())),
    (9, |code| emit(code.int(9))),
    // Not canonical.
    (13, |code| {
        emit(code.mov(rax, 1u64 << 60));
        emit(code.mov(rax, qword_ptr(rax)));
    }),
    // Not mapped.
    (14, |code| {
        emit(code.mov(rax, HIGH + 0x1000));
        emit(code.mov(rax, qword_ptr(rax)));
    }),
];

fn exceptions_lead_to_their_handlers(_: &Ctx) {
    for (vector, cause) in EXCEPTIONS {
        note!("vector {vector}");
        let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| {
            attempt(code, cause);
            emit(code.nop());
        });
        survive(&vm, &mut vcpu, Mode::Long, vector);
        let handler = handler(&vm, &mut vcpu, Mode::Long, vector);
        let end = rips[rips.len() - 1];
        let after = rips[rips.len() - 2];
        let mut tool = hook(&vm);
        tool.run_telling(&mut vcpu, &[Wish::Step]);
        let seen = trace(&mut tool, 0, end);
        // Up to the instruction, then the four of the handler, then what it returns to.
        let before = rips.len() - 3;
        assert_eq!(seen[..before], rips[1..=before], "{seen:#x?}");
        assert_eq!(seen[before], handler, "{seen:#x?}");
        assert_eq!(seen[before + 4..], [after, end], "{seen:#x?}");
        tool.expect_end(&mut vcpu);
        assert_eq!(faults(&vm), 1);
    }
}

/// A VM with a vCPU that sends an interrupt to itself and then does this.
fn interrupted(write: impl FnOnce(&mut CodeAssembler)) -> (TestVm, Vcpu, Vec<u64>) {
    let mut vm = TestVm::new().with_irqchip();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    let rips = load(&vm, &mut vcpu, Mode::Long, |code| {
        emit(code.cli());
        // The local APIC on, as x2APIC.
        write_msr(code, 0x1b, 0xfee0_0d00);
        write_msr(code, 0x80f, 0x1ff);
        write_msr(code, 0x83f, VECTOR.into());
        write(code);
    });
    (vm, vcpu, rips)
}

fn interrupt_waits_for_a_few_instructions(_: &Ctx) {
    const MOST: usize = 16;
    let (vm, mut vcpu, rips) = interrupted(|code| {
        emit(code.out(0x11, al));
        emit(code.sti());
        nops(code, NOPS);
    });
    let sti = rips.len() - 1 - NOPS - 1;
    let entry = handler(&vm, &mut vcpu, Mode::Long, VECTOR);
    let mut tool = hook(&vm);
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x11));
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    let seen = trace(&mut tool, 0, rips[rips.len() - 1]);
    let stub = entry..entry + 16;
    let at = seen.iter().position(|rip| stub.contains(rip));
    let at = at.expect("the interrupt is delivered");
    note!("the interrupt comes after {at} instructions");
    // STI, and what comes next.
    assert_eq!(seen[..at], rips[sti + 1..=sti + at], "{seen:#x?}");
    assert!(at <= MOST + 1, "{seen:#x?}");
    tool.expect_end(&mut vcpu);
    let record = vm.record(0);
    assert_eq!((record.vector, record.count), (VECTOR.into(), 1));
}

fn nmi_is_delivered(_: &Ctx) {
    let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| {
        emit(code.out(0x11, al));
        nops(code, NOPS);
        emit(code.out(0x12, al));
        nops(code, NOPS);
    });
    let (first, second) = rips[1..].split_at(NOPS + 1);
    let mut tool = hook(&vm);
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    for (nmi, port, own) in [(1, 0x11, first), (2, 0x12, second)] {
        assert_eq!(vcpu.exit(), Exit::Out(port));
        vcpu.with(|fd| fd.nmi()).expect("KVM_NMI");
        vcpu.run();
        let seen = trace(&mut tool, 0, own[NOPS]);
        // But for the handler, each of the guest's instructions once, and one of them once more
        // when the handler returns.
        let mut there: Vec<_> = seen.iter().filter(|rip| own.contains(rip)).collect();
        assert!(there.len() - own.len() <= 1, "{seen:#x?}");
        there.dedup();
        assert_eq!(there, own.iter().collect::<Vec<_>>(), "{seen:#x?}");
        let record = vm.record(0);
        assert_eq!((record.vector, record.count), (2, nmi));
    }
    tool.expect_end(&mut vcpu);
}

fn halted_vcpu_goes_on(_: &Ctx) {
    let (vm, mut vcpu, rips) = interrupted(|code| {
        emit(code.sti());
        emit(code.hlt());
        nops(code, 3);
    });
    let behind = rips[rips.len() - 4];
    let mut tool = hook(&vm);
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    let seen = trace(&mut tool, 0, rips[rips.len() - 1]);
    let times = seen.iter().filter(|rip| **rip == behind).count();
    // Once after HLT, and perhaps once more after IRET.
    assert!((1..=2).contains(&times), "{seen:#x?}");
    tool.expect_end(&mut vcpu);
    let record = vm.record(0);
    assert_eq!((record.vector, record.count), (VECTOR.into(), 1));
}
