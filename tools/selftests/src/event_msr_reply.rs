// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Replies to MSR events, and other ways to end them; what the VMM has to say.

use iced_x86::code_asm::*;
use kvmi_abi::{Action, Command, Event, KvmiError};

use crate::{
    access_tool::emit,
    event_code::{attempt, code_in, faults, load, survive, write_msr},
    event_common::{expect_crash, expect_refused, Doing, Wish},
    event_msr::{about_to_write, KERNEL_GS_BASE, MSRS},
    guest::{Mode, SPIN_CODE},
    harness::{note, test, Ctx, Test},
    registers::LSTAR,
    vcpu::Exit,
};

const AREA: &str = "event_msr_reply";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(value_of_the_tool_is_written),
    test!(write_that_faults_can_be_mended),
    test!(impossible_value_of_the_tool_ends_the_connection),
    test!(retry_is_refused),
    test!(crash_ends_kvm_run),
    test!(filter_of_the_vmm_comes_first),
    test!(writes_of_the_vmm_make_no_event),
    test!(next_tool_is_told_nothing),
];

fn value_of_the_tool_is_written(_: &Ctx) {
    for (msr, [new, value]) in MSRS {
        note!("MSR {msr:#x}");
        let (vm, mut vcpu, doing) = about_to_write(msr, new);
        let old = vcpu.msr(msr);
        for value in [value, old] {
            vcpu.set_msrs(&[(msr, old)]);
            load(&vm, &mut vcpu, Mode::Long, |code| {
                write_msr(code, msr, new);
                emit(code.rdmsr());
            });
            let mut tool = vm.hook_allowing_all();
            tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
            let event = tool.expect(0, doing);
            tool.replace(&event, value);
            tool.expect_end(&mut vcpu);
            let regs = vcpu.regs();
            assert_eq!(regs.rdx << 32 | regs.rax, value);
            assert_eq!(vcpu.msr(msr), value);
            vm.unhook();
        }
    }
}

fn write_that_faults_can_be_mended(_: &Ctx) {
    // Not canonical.
    const BAD: u64 = 0x1234_5678_9abc_def0;
    const GOOD: u64 = 0xffff_8000_0000_1000;
    for msr in [LSTAR, KERNEL_GS_BASE] {
        for mend in [true, false] {
            note!("MSR {msr:#x}, mend: {mend}");
            let (vm, mut vcpu) = code_in(Mode::Long, |code| {
                attempt(code, |code| write_msr(code, msr, BAD));
            });
            survive(&vm, &mut vcpu, Mode::Long, 13);
            let old = vcpu.msr(msr);
            let mut tool = vm.hook_allowing_all();
            tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
            let event = tool.expect(0, Doing::Msr { msr, old, new: BAD });
            tool.replace(&event, if mend { GOOD } else { BAD });
            tool.expect_end(&mut vcpu);
            assert_eq!(faults(&vm), u32::from(!mend));
            assert_eq!(vcpu.msr(msr), if mend { GOOD } else { old });
        }
    }
}

fn impossible_value_of_the_tool_ends_the_connection(_: &Ctx) {
    const BAD: u64 = 0x1234_5678_9abc_def0;
    for (msr, [new, _]) in [MSRS[3], MSRS[5], MSRS[8]] {
        note!("MSR {msr:#x}");
        let (vm, mut vcpu, doing) = about_to_write(msr, new);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
        let event = tool.expect(0, doing);
        tool.replace(&event, BAD);
        tool.expect_closed();
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        assert_eq!(vcpu.msr(msr), new);
        assert_eq!(vm.record(0).count, 0, "the guest got an exception");
        vm.unhook();
        vm.hook_allowing_all();
    }
}

fn retry_is_refused(_: &Ctx) {
    let (msr, [new, _]) = MSRS[5];
    let (vm, mut vcpu, doing) = about_to_write(msr, new);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
    let event = tool.expect(0, doing);
    expect_refused(tool, &mut vcpu, &event, Action::Retry);
    assert_eq!(vcpu.msr(msr), new);
}

fn crash_ends_kvm_run(_: &Ctx) {
    let (msr, [new, _]) = MSRS[5];
    let (vm, mut vcpu, doing) = about_to_write(msr, new);
    let old = vcpu.msr(msr);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
    let event = tool.expect(0, doing);
    expect_crash(&mut tool, &mut vcpu, &event);
    assert_eq!(vcpu.msr(msr), old);
}

fn filter_of_the_vmm_comes_first(_: &Ctx) {
    let (msr, [one, two]) = MSRS[5];
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        attempt(code, |code| write_msr(code, msr, one));
        emit(code.out(0x11, al));
        attempt(code, |code| write_msr(code, msr, two));
        emit(code.out(0x12, al));
        write_msr(code, msr, one);
    });
    survive(&vm, &mut vcpu, Mode::Long, 13);
    let old = vcpu.msr(msr);
    let event = |old, new| Doing::Msr { msr, old, new };
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
    tool.let_pass(0, &[event(old, one)]);
    assert_eq!(vcpu.exit(), Exit::Out(0x11));

    // From here on, the guest gets what the VMM wants it to get, and nobody is told.
    vm.deny_msr_writes(&[msr]);
    vcpu.run();
    assert_eq!(vcpu.exit(), Exit::Out(0x12));
    assert_eq!((faults(&vm), vcpu.msr(msr)), (1, one));
    let refused = tool.send_to(0, Command::VcpuControlMsr, &[1, 0, 0, 0, 0x82, 0, 0, 0xc0]);
    let off = tool.send_to(0, Command::VcpuControlMsr, &[0, 0, 0, 0, 0x82, 0, 0, 0xc0]);
    let others = tool.send_to(0, Command::VcpuControlMsr, &[1, 0, 0, 0, 0x81, 0, 0, 0xc0]);
    tool.settle();
    vcpu.set_msrs(&[(msr, two)]);
    vcpu.change_regs(|regs| regs.rip = SPIN_CODE);
    vcpu.run();
    let id = Command::VcpuControlMsr.id();
    assert_eq!(tool.reply_to(id, refused), Err(KvmiError::Perm));
    assert_eq!(tool.reply_to(id, off), Ok(vec![]));
    assert_eq!(tool.reply_to(id, others), Ok(vec![]));
    vcpu.stop();

    vm.deny_msr_writes(&[]);
    load(&vm, &mut vcpu, Mode::Long, |code| write_msr(code, msr, one));
    tool.expect_events(&mut vcpu, &[Wish::Msr(msr)], &[event(two, one)]);
}

fn writes_of_the_vmm_make_no_event(_: &Ctx) {
    let (vm, mut vcpu) = code_in(Mode::Long, |code| emit(code.out(0x11, al)));
    let all = MSRS.map(|(msr, _)| Wish::Msr(msr));
    let values = MSRS.map(|(msr, [new, _])| (msr, new));
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &all);
    assert_eq!(vcpu.exit(), Exit::Out(0x11));
    vcpu.set_msrs(&values);
    vcpu.run();
    tool.expect_end(&mut vcpu);
    assert_eq!(MSRS.map(|(msr, _)| (msr, vcpu.msr(msr))), values);
}

fn next_tool_is_told_nothing(_: &Ctx) {
    for (msr, [one, two]) in [MSRS[2], MSRS[5], MSRS[8]] {
        for unhook in [true, false] {
            note!("MSR {msr:#x}, unhook: {unhook}");
            let (vm, mut vcpu, doing) = about_to_write(msr, one);
            let mut tool = vm.hook_allowing_all();
            tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
            tool.expect(0, doing);
            // In the middle of the event.
            if unhook {
                vm.unhook();
            } else {
                drop(tool.disconnect());
            }
            assert_eq!(vcpu.exit(), Exit::Out(0x10));
            assert_eq!(vcpu.msr(msr), one);
            if !unhook {
                vm.unhook();
            }
            let mut next = vm.hook_allowing_all();
            load(&vm, &mut vcpu, Mode::Long, |code| write_msr(code, msr, two));
            next.expect_events(&mut vcpu, &[Wish::Event(Event::Msr)], &[]);
            assert_eq!(vcpu.msr(msr), two);
        }
    }
}
