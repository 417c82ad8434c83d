// SPDX-License-Identifier: GPL-2.0 OR MIT

//! MSR events: the guest writes an MSR, and the tool decides what it gets.

use iced_x86::code_asm::*;
use kvmi_abi::{Command, Event, KvmiError};

use crate::{
    access_tool::emit,
    event_code::{add_features_ecx, add_vcpu, attempt, code_in, faults, load, survive, write_msr},
    event_common::{Doing, Wish},
    guest::Mode,
    harness::{note, test, Ctx, Test},
    registers::{EFER, LSTAR, STAR},
    sys,
    vcpu::{Exit, Vcpu},
    vm::TestVm,
};

const AREA: &str = "event_msr";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(arguments_are_checked),
    test!(each_write_is_told_before_it_takes_effect),
    test!(writes_are_told_in_each_mode),
    test!(same_value_makes_no_event),
    test!(only_chosen_msrs_make_events),
    test!(msrs_are_chosen_for_one_vcpu),
    test!(no_longer_chosen_msr_makes_no_event),
    test!(each_of_many_writes_is_told),
    test!(deadline_of_the_timer_is_told),
    test!(msr_that_is_not_there_faults_as_ever),
];

const PAT: u32 = 0x277;
const CSTAR: u32 = 0xc000_0083;
const SFMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;

/// MSRs, some of which KVM leaves to the guest, and two values that they can have.
pub const MSRS: [(u32, [u64; 2]); 9] = [
    (SYSENTER_CS, [0x10, 0x20]),
    (SYSENTER_ESP, [0x1234_5000, 0x1234_6000]),
    (SYSENTER_EIP, [0x1234_7000, 0x1234_8000]),
    (PAT, [0x0606_0606_0606_0606, 0x0606_0606_0606_0600]),
    (STAR, [0x1234_5678_0000_0000, 0x10_0008_0000_0000]),
    (LSTAR, [0xffff_8000_1234_5678, 0xffff_8000_8765_4321]),
    (SFMASK, [0x4_7700, 0x700]),
    (FS_BASE, [0x1234_0000, 0xffff_8000_0000_0000]),
    (KERNEL_GS_BASE, [0xffff_8800_0000_1000, 0x7fff_0000_0000]),
];

/// A VM with one vCPU that is about to write to an MSR, once; returns what is told of it, too.
pub fn about_to_write(msr: u32, new: u64) -> (TestVm, Vcpu, Doing) {
    let (vm, mut vcpu) = code_in(Mode::Long, |code| write_msr(code, msr, new));
    let old = vcpu.msr(msr);
    (vm, vcpu, Doing::Msr { msr, old, new })
}

fn arguments_are_checked(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    for (msr, expected) in [
        (0, Ok(())),
        (0x10, Ok(())),
        (0x1da, Ok(())),
        (0x1db, Err(KvmiError::Inval)),
        (0x1de, Err(KvmiError::Inval)),
        (0x1df, Ok(())),
        (0x80b, Ok(())),
        (0x1fff, Ok(())),
        (0x2000, Err(KvmiError::Inval)),
        (0x4b56_4d00, Err(KvmiError::Inval)),
        (0xbfff_ffff, Err(KvmiError::Inval)),
        (0xc000_0000, Ok(())),
        (LSTAR, Ok(())),
        (0xc000_1fff, Ok(())),
        (0xc000_2000, Err(KvmiError::Inval)),
        (u32::MAX, Err(KvmiError::Inval)),
    ] {
        for enable in [1, 1, 0, 0] {
            assert_eq!(tool.control_msr(0, msr, enable), expected, "MSR {msr:#x}");
        }
    }
    for enable in [2, 0x80, 0xff] {
        assert_eq!(tool.control_msr(0, LSTAR, enable), Err(KvmiError::Inval));
    }
    for at in 1..4 {
        let mut request = [1, 0, 0, 0, 0x82, 0, 0, 0xc0];
        request[at] = 1;
        let refused = tool.call_vcpu(0, Command::VcpuControlMsr, &request);
        assert_eq!(refused, Err(KvmiError::Inval), "byte {at}");
    }
    for enable in [1, 1, 0, 0] {
        let id = Event::Msr.id();
        assert_eq!(tool.control_vcpu_event(0, id, enable), Ok(()));
    }
    sys::event(&vm, 0, Event::Msr.id().into()).expect("an event can be disallowed");
    assert_eq!(tool.control_msr(0, LSTAR, 1), Err(KvmiError::Perm));
    let refused = tool.control_vcpu_event(0, Event::Msr.id(), 1);
    assert_eq!(refused, Err(KvmiError::Perm));
    vm.expect_progress();
}

fn each_write_is_told_before_it_takes_effect(_: &Ctx) {
    for (msr, [new, _]) in MSRS {
        note!("MSR {msr:#x}");
        let (vm, mut vcpu, doing) = about_to_write(msr, new);
        let old = vcpu.msr(msr);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
        let event = tool.expect(0, doing);
        let regs = event.arch.regs;
        assert_eq!((regs.rcx, regs.rax), (msr.into(), new & 0xffff_ffff));
        let (_, msrs) = tool.registers(0, &[msr]).expect("it can be read");
        assert_eq!(msrs[0].data, old);
        tool.resume(&event);
        tool.expect_end(&mut vcpu);
        assert_eq!(vcpu.msr(msr), new);
    }
    let (vm, mut vcpu, _) = about_to_write(EFER, 0);
    let old = vcpu.msr(EFER);
    let new = old ^ 1;
    load(&vm, &mut vcpu, Mode::Long, |code| {
        write_msr(code, EFER, new)
    });
    let mut tool = vm.hook_allowing_all();
    let event = Doing::Msr {
        msr: EFER,
        old,
        new,
    };
    tool.expect_events(&mut vcpu, &[Wish::Msr(EFER)], &[event]);
    assert_eq!(vcpu.msr(EFER), new);
}

fn writes_are_told_in_each_mode(_: &Ctx) {
    for (mode, _) in Mode::ALL {
        note!("{mode:?}");
        let mut vm = TestVm::new();
        let mut vcpu = add_vcpu(&mut vm, mode);
        let [old_esp, old_pat] = [SYSENTER_ESP, PAT].map(|msr| vcpu.msr(msr));
        load(&vm, &mut vcpu, mode, |code| {
            write_msr(code, SYSENTER_ESP, 0x1234_5000);
            write_msr(code, PAT, 0x0606_0606_0606_0606);
        });
        let event = |msr, old, new| Doing::Msr { msr, old, new };
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Msr(SYSENTER_ESP), Wish::Msr(PAT)]);
        let first = event(SYSENTER_ESP, old_esp, 0x1234_5000);
        tool.let_pass(0, &[first]);
        let second = tool.expect(0, event(PAT, old_pat, 0x0606_0606_0606_0606));
        tool.replace(&second, 0x0404_0606_0606_0606);
        tool.expect_end(&mut vcpu);
        let values = [SYSENTER_ESP, PAT].map(|msr| vcpu.msr(msr));
        assert_eq!(values, [0x1234_5000, 0x0404_0606_0606_0606]);
    }
}

fn same_value_makes_no_event(_: &Ctx) {
    let all = MSRS.map(|(msr, _)| Wish::Msr(msr));
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        for (msr, _) in MSRS {
            emit(code.mov(ecx, msr));
            emit(code.rdmsr());
            emit(code.wrmsr());
        }
    });
    let mut tool = vm.hook_allowing_all();
    tool.expect_events(&mut vcpu, &all, &[]);
}

fn only_chosen_msrs_make_events(_: &Ctx) {
    let (msr, [new, other]) = MSRS[5];
    assert_eq!(msr, LSTAR);
    for wishes in [&[][..], &[Wish::Event(Event::Msr)], &[Wish::Msr(CSTAR)]] {
        note!("{wishes:?}");
        let (vm, mut vcpu) = code_in(Mode::Long, |code| {
            for (msr, [new, _]) in MSRS {
                write_msr(code, msr, new);
            }
        });
        let mut tool = vm.hook_allowing_all();
        tool.expect_events(&mut vcpu, wishes, &[]);
        assert_eq!(
            MSRS.map(|(msr, _)| vcpu.msr(msr)),
            MSRS.map(|(_, [new, _])| new)
        );
    }
    // Chosen, but the event is off.
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        emit(code.out(0x11, al));
        write_msr(code, msr, new);
        emit(code.out(0x12, al));
        write_msr(code, msr, other);
    });
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
    assert_eq!(vcpu.exit(), Exit::Out(0x11));
    let seq = tool.send_to(0, Command::VcpuControlEvents, &[15, 0, 0, 0, 0, 0, 0, 0]);
    tool.settle();
    vcpu.run();
    assert!(tool.reply_to(Command::VcpuControlEvents.id(), seq).is_ok());
    assert_eq!(vcpu.exit(), Exit::Out(0x12));
    // And on again, with what was chosen before.
    let event = Doing::Msr {
        msr,
        old: new,
        new: other,
    };
    tool.expect_events(&mut vcpu, &[Wish::Event(Event::Msr)], &[event]);
}

fn msrs_are_chosen_for_one_vcpu(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpus = [(); 2].map(|()| add_vcpu(&mut vm, Mode::Long));
    let (msr, [new, _]) = MSRS[5];
    let old = vcpus[0].msr(msr);
    for vcpu in &mut vcpus {
        load(&vm, vcpu, Mode::Long, |code| write_msr(code, msr, new));
    }
    let mut tool = vm.hook_allowing_all();
    let [first, second] = &mut vcpus;
    tool.expect_events(second, &[Wish::Msr(msr)], &[Doing::Msr { msr, old, new }]);
    tool.expect_events(first, &[Wish::Event(Event::Msr)], &[]);
    assert_eq!((first.msr(msr), second.msr(msr)), (new, new));
}

fn no_longer_chosen_msr_makes_no_event(_: &Ctx) {
    for (msr, [one, two]) in MSRS {
        note!("MSR {msr:#x}");
        let (vm, mut vcpu) = code_in(Mode::Long, |code| {
            write_msr(code, msr, one);
            write_msr(code, msr, two);
            write_msr(code, msr, one);
        });
        let old = vcpu.msr(msr);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
        let first = tool.expect(0, Doing::Msr { msr, old, new: one });
        // During its own event.
        assert_eq!(tool.control_msr(0, msr, 0), Ok(()));
        tool.resume(&first);
        tool.expect_end(&mut vcpu);
        assert_eq!(vcpu.msr(msr), one);
    }
}

fn each_of_many_writes_is_told(ctx: &Ctx) {
    let rounds = ctx.rounds(500);
    for (msr, [one, two]) in [MSRS[2], MSRS[5], MSRS[8]] {
        let (vm, mut vcpu) = code_in(Mode::Long, |code| {
            emit(code.mov(r8, rounds as u64));
            let mut again = code.create_label();
            emit(code.set_label(&mut again));
            write_msr(code, msr, one);
            write_msr(code, msr, two);
            emit(code.dec(r8));
            emit(code.jne(again));
        });
        vcpu.set_msrs(&[(msr, two)]);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Msr(msr)]);
        for _ in 0..rounds {
            let event = |old, new| Doing::Msr { msr, old, new };
            tool.let_pass(0, &[event(two, one), event(one, two)]);
        }
        tool.expect_end(&mut vcpu);
    }
}

fn deadline_of_the_timer_is_told(_: &Ctx) {
    const DEADLINE: u32 = 0x6e0;
    const DEADLINE_FEATURE: u32 = 1 << 24;
    const X2APIC_FEATURE: u32 = 1 << 21;
    let mut vm = TestVm::new().with_irqchip();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    add_features_ecx(&mut vcpu, DEADLINE_FEATURE | X2APIC_FEATURE);
    load(&vm, &mut vcpu, Mode::Long, |code| {
        // x2APIC on, and its timer waits for a deadline, but is masked.
        write_msr(code, 0x1b, 0xfee0_0d00);
        write_msr(code, 0x80f, 0x1ff);
        write_msr(code, 0x832, 0x5_001f);
        write_msr(code, DEADLINE, 1 << 62);
        write_msr(code, DEADLINE, 1 << 61);
        emit(code.rdmsr());
    });
    let event = |old, new| Doing::Msr {
        msr: DEADLINE,
        old,
        new,
    };
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[Wish::Msr(DEADLINE)]);
    tool.let_pass(0, &[event(0, 1 << 62)]);
    let second = tool.expect(0, event(1 << 62, 1 << 61));
    tool.replace(&second, 1 << 60);
    tool.expect_end(&mut vcpu);
    assert_eq!(vcpu.regs().rdx, 1 << 28);
}

fn msr_that_is_not_there_faults_as_ever(_: &Ctx) {
    const NONE: u32 = 0x1ffe;
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        attempt(code, |code| write_msr(code, NONE, 1));
        attempt(code, |code| write_msr(code, 0xdead_beef, 1));
    });
    survive(&vm, &mut vcpu, Mode::Long, 13);
    let mut tool = vm.hook_allowing_all();
    tool.expect_events(&mut vcpu, &[Wish::Msr(NONE)], &[]);
    assert_eq!(faults(&vm), 2);
}
