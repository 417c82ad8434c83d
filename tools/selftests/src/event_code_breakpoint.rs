// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Events of instructions at which the guest's own debugger has a breakpoint of the CPU's.

use std::sync::atomic::Ordering::Relaxed;

use iced_x86::code_asm::*;
use kvmi_abi::{
    guest_event::{Cr, DescriptorRegister},
    Action, Event,
};

use crate::{
    access_tool::emit,
    event_code::{add_vcpu, is_tcg, load, set_handler, write_cr, write_msr, CODE, DATA},
    event_common::{Doing, Wish},
    event_cr::{self, OTHER_TABLES},
    event_hypercall::call,
    guest::{Mode, PML4},
    harness::{note, skip, test, Ctx, Test},
    registers::LSTAR,
    vcpu::Vcpu,
    vm::TestVm,
};

const AREA: &str = "event_code_breakpoint";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(breakpoint_is_hit_once_at_what_is_told),
    test!(breakpoint_is_hit_once_at_what_is_told_again),
    test!(breakpoint_behind_what_is_told_is_hit),
];

/// Where the guest's debugger counts.
const HITS: u64 = DATA + 0x80;
const HANDLER: u64 = CODE + 0x700;
const DB: u8 = 1;
/// DR7: DR0 is an address of code, and is heeded.
const CODE_AT_DR0: u32 = 0x401;

/// One that is told, what tells it, and the code that ends with it.
type Told = (Doing, Wish, fn(&mut CodeAssembler));

const ALL: [Told; 5] = [
    (
        Doing::Cr {
            cr: Cr::Cr3,
            old: PML4,
            new: OTHER_TABLES,
        },
        Wish::Cr(Cr::Cr3),
        |code| write_cr(code, Cr::Cr3, OTHER_TABLES),
    ),
    (
        Doing::Msr {
            msr: LSTAR,
            old: 0,
            new: 0x1234,
        },
        Wish::Msr(LSTAR),
        |code| write_msr(code, LSTAR, 0x1234),
    ),
    (
        Doing::Descriptor {
            register: DescriptorRegister::Gdtr,
            load: false,
        },
        Wish::Event(Event::Descriptor),
        |code| emit(code.sgdt(ptr(DATA))),
    ),
    (
        Doing::Descriptor {
            register: DescriptorRegister::Ldtr,
            load: false,
        },
        Wish::Event(Event::Descriptor),
        |code| emit(code.sldt(ax)),
    ),
    (Doing::Hypercall, Wish::Event(Event::Hypercall), call),
];

/// A vCPU that is about to do this with a breakpoint at its last instruction, or at the next one.
fn about_to(write: fn(&mut CodeAssembler), behind: bool) -> (TestVm, Vcpu) {
    if is_tcg() {
        skip("QEMU keeps breakpoints of guests, hits some twice, and crashes in the end");
    }
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    // Writes the other page tables.
    event_cr::values(&vm, &mut vcpu, Cr::Cr3);

    let mut code = CodeAssembler::new(64).expect("64-bit code");
    emit(code.inc(dword_ptr(HITS)));
    // Not all CPUs do that themselves for this exception; debuggers do it anyway.
    emit(code.or(dword_ptr(rsp + 16), 0x10000));
    emit(code.iretq());
    let handler = code.assemble(HANDLER).expect("code that can be encoded");
    vm.memory.write(HANDLER, &handler);
    set_handler(&vm, &mut vcpu, Mode::Long, DB, HANDLER);

    // Where the breakpoint is to be is known when the code has its length.
    let mut at = 0;
    for _ in 0..2 {
        let rips = load(&vm, &mut vcpu, Mode::Long, |code| {
            emit(code.mov(ecx, at as u32));
            emit(code.mov(dr0, rcx));
            emit(code.mov(ecx, CODE_AT_DR0));
            emit(code.mov(dr7, rcx));
            write(code);
            emit(code.nop());
        });
        at = rips[rips.len() - if behind { 2 } else { 3 }];
    }
    (vm, vcpu)
}

#[track_caller]
fn expect_hit_once(vm: &TestVm) {
    assert_eq!(vm.memory.number(HITS).load(Relaxed), 1);
}

/// Does everything with a breakpoint at it, or behind it.
fn do_all(behind: bool) {
    for (doing, wish, write) in ALL {
        note!("{doing:x?}");
        let (vm, mut vcpu) = about_to(write, behind);
        let mut tool = vm.hook_allowing_all();
        tool.expect_events(&mut vcpu, &[wish], &[doing]);
        expect_hit_once(&vm);
    }
}

fn breakpoint_is_hit_once_at_what_is_told(_: &Ctx) {
    do_all(false);
}

fn breakpoint_is_hit_once_at_what_is_told_again(_: &Ctx) {
    let (doing, wish, write) = ALL[3];
    let (vm, mut vcpu) = about_to(write, false);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[wish]);
    let first = tool.expect(0, doing);
    tool.answer(&first, Action::Retry);
    tool.let_pass(0, &[doing]);
    tool.expect_end(&mut vcpu);
    expect_hit_once(&vm);
}

fn breakpoint_behind_what_is_told_is_hit(_: &Ctx) {
    do_all(true);
}
