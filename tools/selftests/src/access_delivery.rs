// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page access by the delivery of exceptions and interrupts: tables, stack and handler.

use iced_x86::code_asm::*;
use kvmi_abi::{
    access::{ALL, R, W, X},
    Event,
};

use crate::{
    access_tool::{add_code, emit, expect_accesses, with_code, CODE, NEXT, TARGET},
    harness::{note, test, Ctx, Test},
    util::wait_for,
    vcpu::{Exit, Vcpu},
    vm::TestVm,
};

const AREA: &str = "access_delivery";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(tables_that_delivery_reads_are_reported),
    test!(handler_on_a_protected_page_is_reported),
    test!(event_delivered_to_a_protected_stack_is_reported),
    test!(interrupt_delivered_to_a_protected_stack_is_reported),
];

/// The vector of a fault, to which the handler returns.
const FAULT: u64 = 6;
/// Writes code that causes an exception.
type Cause = fn(&mut CodeAssembler);

/// Exceptions and their causes.
const EXCEPTIONS: [(u64, Cause); 3] = [
    (3, |code| emit(code.int3())),
    (FAULT, |code| emit(code.ud2())),
    (9, |code| emit(code.int(9))),
];

/// Has the tables at [`TARGET`] (IDT) and [`NEXT`] (GDT); returns where the handler of `vector` is.
fn move_tables(vm: &TestVm, vcpu: &mut Vcpu, vector: u64) -> u64 {
    let memory = vm.memory;
    vcpu.with(move |fd| {
        let mut sregs = fd.get_sregs().expect("KVM_GET_SREGS");
        for (table, to) in [(&mut sregs.idt, TARGET), (&mut sregs.gdt, NEXT)] {
            memory.write(to, &memory.read(table.base, usize::from(table.limit) + 1));
            table.base = to;
        }
        fd.set_sregs(&sregs).expect("KVM_SET_SREGS");
    });
    let gate = memory.read(TARGET + 16 * vector, 8);
    u64::from_le_bytes([gate[0], gate[1], gate[6], gate[7], 0, 0, 0, 0])
}

fn tables_that_delivery_reads_are_reported(_: &Ctx) {
    const CODE_SEGMENT: u64 = 8;
    for (vector, cause) in EXCEPTIONS {
        if vector == FAULT {
            continue;
        }
        note!("vector {vector}");
        let (vm, mut vcpu) = with_code(cause);
        move_tables(&vm, &mut vcpu, vector);
        let mut tool = vm.hook_allowing_all();
        tool.deny(TARGET, ALL);
        tool.deny(NEXT, ALL);
        let accesses = [
            (TARGET + 16 * vector, R),
            (NEXT + CODE_SEGMENT, R),
            // IRET
            (NEXT + CODE_SEGMENT, R),
        ];
        expect_accesses(&mut tool, &mut vcpu, &accesses);
        let record = vm.record(0);
        assert_eq!((record.vector, record.count), (vector, 1));
    }
}

fn handler_on_a_protected_page_is_reported(_: &Ctx) {
    for (vector, cause) in EXCEPTIONS {
        note!("vector {vector}");
        let (vm, mut vcpu) = with_code(cause);
        let handler = move_tables(&vm, &mut vcpu, vector);
        let mut tool = vm.hook_allowing_all();
        tool.deny(handler, X);
        tool.run_wanting_pf(&mut vcpu);
        let event = tool.expect_pf(0, handler, X);
        assert_eq!(event.arch.regs.rip, handler);
        assert_eq!(vm.record(0).count, 0, "nothing of it was executed");
        // The rest is permitted without asking.
        let unwanted = tool.control_vcpu_event(0, Event::Pf.id(), 0);
        assert_eq!(unwanted, Ok(()));
        tool.resume(&event);
        if vector == FAULT {
            // It comes again and again: the handler returns to it.
            wait_for("the handler returns", || vm.record(0).count > 1);
            vcpu.stop();
        } else {
            assert_eq!(vcpu.exit(), Exit::Out(0x10));
            assert_eq!(vm.record(0).count, 1);
        }
        assert_eq!(vm.record(0).vector, vector);
    }
}

/// Runs code that has its stack below [`NEXT`] when there is an exception or interrupt.
#[track_caller]
fn expect_pushes(vm: &TestVm, vcpu: &mut Vcpu, vector: u64) {
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    // What the CPU pushes, all of it at once; then three words of the handler.
    let pushes = [1, 6, 7, 8].map(|word| (NEXT - 8 * word, W));
    expect_accesses(&mut tool, vcpu, &pushes);
    let record = vm.record(0);
    assert_eq!((record.vector, record.count), (vector, 1));
}

fn event_delivered_to_a_protected_stack_is_reported(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(r8, rsp));
        emit(code.mov(rsp, NEXT));
        emit(code.int3());
        emit(code.mov(rsp, r8));
    });
    expect_pushes(&vm, &mut vcpu, 3);
}

fn interrupt_delivered_to_a_protected_stack_is_reported(_: &Ctx) {
    const VECTOR: u32 = 31;
    let mut vm = TestVm::new().with_irqchip();
    let mut vcpu = add_code(&mut vm, CODE, |code| {
        let write_msr = |code: &mut CodeAssembler, msr: u32, value: u32| {
            emit(code.mov(ecx, msr));
            emit(code.mov(eax, value));
            emit(code.xor(edx, edx));
            emit(code.wrmsr());
        };
        emit(code.cli());
        // The local APIC on, as x2APIC, and an interrupt to itself.
        write_msr(code, 0x1b, 0xfee0_0d00);
        write_msr(code, 0x80f, 0x1ff);
        write_msr(code, 0x83f, VECTOR);
        emit(code.mov(r8, rsp));
        emit(code.mov(rsp, NEXT));
        emit(code.sti());
        emit(code.nop());
        emit(code.nop());
        emit(code.cli());
        emit(code.mov(rsp, r8));
    });
    expect_pushes(&vm, &mut vcpu, VECTOR.into());
}
