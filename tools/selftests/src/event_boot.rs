// SPDX-License-Identifier: GPL-2.0 OR MIT

//! CR events of a guest on its way from real to 64-bit mode.

use iced_x86::code_asm::*;
use kvmi_abi::guest_event::Cr;

use crate::{
    access_tool::emit,
    event_code::{add_vcpu, load, write_cr, write_msr, CODE, DATA},
    event_common::{Doing, Wish},
    guest::{Mode, PML4},
    harness::{test, Ctx, Test},
    registers::EFER,
    vm::TestVm,
};

const AREA: &str = "event_boot";

/// The tests of this file.
pub const TESTS: &[Test] = &[test!(way_from_real_to_64_bit_mode_is_told)];

fn way_from_real_to_64_bit_mode_is_told(_: &Ctx) {
    const PE: u64 = 1;
    const PG: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    const LME: u64 = 1 << 8;
    let mut vm = TestVm::new();
    let mut long = add_vcpu(&mut vm, Mode::Long);
    let gdt = long.sregs().gdt;
    let mut vcpu = add_vcpu(&mut vm, Mode::Real);
    // The limit, and the base.
    vm.memory.write(DATA, &gdt.limit.to_le_bytes());
    vm.memory.write(DATA + 2, &(gdt.base as u32).to_le_bytes());
    let before = vcpu.sregs();
    // Caches on, too: a processor begins with them off.
    let protected = before.cr0 & !0x6000_0000 | PE;
    // Whatever is behind the jumps, in their modes.
    let (there32, there64) = (CODE + 0x600, CODE + 0x680);
    load(&vm, &mut vcpu, Mode::Real, |code| {
        emit(code.lgdt(ptr(DATA)));
        write_cr(code, Cr::Cr0, protected);
        // ljmpl $24, there32
        let target = u32::try_from(there32).expect("32 bits").to_le_bytes();
        emit(code.db(&[0x66, 0xea]));
        emit(code.db(&target));
        emit(code.db(&[24, 0]));
    });
    let mut code = CodeAssembler::new(32).expect("32-bit code");
    write_cr(&mut code, Cr::Cr4, before.cr4 | PAE);
    write_cr(&mut code, Cr::Cr3, PML4);
    write_msr(&mut code, EFER, LME);
    write_cr(&mut code, Cr::Cr0, protected | PG);
    let target = u32::try_from(there64).expect("32 bits").to_le_bytes();
    emit(code.db(&[0xea]));
    emit(code.db(&target));
    emit(code.db(&[8, 0]));
    vm.memory
        .write(there32, &code.assemble(there32).expect("code"));
    let mut code = CodeAssembler::new(64).expect("64-bit code");
    emit(code.mov(r15, 0x1234_5678_9abc_def0u64));
    emit(code.out(0x10, al));
    emit(code.hlt());
    vm.memory
        .write(there64, &code.assemble(there64).expect("code"));

    let event = |cr, old, new| Doing::Cr { cr, old, new };
    let events = [
        event(Cr::Cr0, before.cr0, protected),
        event(Cr::Cr4, before.cr4, before.cr4 | PAE),
        event(Cr::Cr3, before.cr3, PML4),
        event(Cr::Cr0, protected, protected | PG),
    ];
    let mut tool = vm.hook_allowing_all();
    let all = Cr::ALL.map(Wish::Cr);
    tool.run_telling(&mut vcpu, &all);
    tool.let_pass(1, &events);
    tool.expect_end(&mut vcpu);
    assert_eq!(vcpu.regs().r15, 0x1234_5678_9abc_def0);
}
