// SPDX-License-Identifier: GPL-2.0 OR MIT

//! CR events: the guest writes CR0, CR3 or CR4, and the tool decides what they get.

use iced_x86::code_asm::*;
use kvmi_abi::{guest_event::Cr, Command, Event, KvmiError};

use crate::{
    access_tool::emit,
    event_code::{
        add_vcpu, attempt, code_in, code_rip, faults, features_ecx, load, survive, write_cr, DATA,
    },
    event_common::{Doing, Wish},
    guest::Mode,
    harness::{note, skip, test, Ctx, Test},
    sys,
    vcpu::{Exit, Vcpu},
    vm::{TestVm, PAGE, SCRATCH},
};

const AREA: &str = "event_cr";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(arguments_are_checked),
    test!(write_is_told_before_it_takes_effect_in_each_mode),
    test!(same_value_makes_no_event),
    test!(only_chosen_registers_make_events),
    test!(each_instruction_that_changes_cr0_makes_an_event),
    test!(each_bit_of_cr4_makes_an_event),
    test!(how_to_flush_is_no_part_of_cr3),
    test!(write_that_faults_makes_no_event),
    test!(writes_of_the_vmm_make_no_event),
];

/// CR0.TS
pub const TS: u64 = 1 << 3;
/// CR0.AM, which changes nothing at CPL 0.
const AM: u64 = 1 << 18;
/// CR0.MP, CR0.EM
const MP_EM: u64 = 6;
/// CR0.WP
const WP: u64 = 1 << 16;
/// CR4.TSD, which changes nothing that the guests use.
const TSD: u64 = 1 << 2;
/// CR4.DE, likewise.
pub const DE: u64 = 1 << 3;
/// Another page for page tables: code of each mode can have it in CR3.
pub const OTHER_TABLES: u64 = SCRATCH;

/// What a register has, and another value that suits the mode.
pub fn values(vm: &TestVm, vcpu: &mut Vcpu, cr: Cr) -> (u64, u64) {
    let sregs = vcpu.sregs();
    match cr {
        Cr::Cr0 => (sregs.cr0, sregs.cr0 ^ AM),
        Cr::Cr3 => {
            let tables = vm.memory.read(sregs.cr3, PAGE);
            vm.memory.write(OTHER_TABLES, &tables);
            (sregs.cr3, OTHER_TABLES)
        }
        Cr::Cr4 => (sregs.cr4, sregs.cr4 ^ TSD),
    }
}

/// What a register has.
pub fn read(vcpu: &mut Vcpu, cr: Cr) -> u64 {
    let sregs = vcpu.sregs();
    match cr {
        Cr::Cr0 => sregs.cr0,
        Cr::Cr3 => sregs.cr3,
        Cr::Cr4 => sregs.cr4,
    }
}

/// A VM with one vCPU that is about to write to a register, once; returns what is told of it, too.
pub fn about_to_write(mode: Mode, cr: Cr) -> (TestVm, Vcpu, Doing) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, mode);
    let (old, new) = values(&vm, &mut vcpu, cr);
    load(&vm, &mut vcpu, mode, |code| write_cr(code, cr, new));
    (vm, vcpu, Doing::Cr { cr, old, new })
}

/// Calls this for each mode and register.
#[track_caller]
pub fn for_each(mut action: impl FnMut(Mode, Cr)) {
    for (mode, _) in Mode::ALL {
        for cr in Cr::ALL {
            note!("{mode:?} {cr:?}");
            action(mode, cr);
        }
    }
}

fn arguments_are_checked(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    for cr in 0..=u8::MAX {
        let expected = if [0, 3, 4].contains(&cr) {
            Ok(())
        } else {
            Err(KvmiError::Inval)
        };
        for enable in [1, 1, 0, 0] {
            assert_eq!(tool.control_cr(0, cr, enable), expected, "CR{cr}");
        }
    }
    for enable in [2, 0x80, 0xff] {
        assert_eq!(tool.control_cr(0, 3, enable), Err(KvmiError::Inval));
    }
    for at in 2..8 {
        let mut request = [3, 1, 0, 0, 0, 0, 0, 0];
        request[at] = 1;
        let refused = tool.call_vcpu(0, Command::VcpuControlCr, &request);
        assert_eq!(refused, Err(KvmiError::Inval), "byte {at}");
    }
    for enable in [1, 1, 0, 0] {
        let id = Event::Cr.id();
        assert_eq!(tool.control_vcpu_event(0, id, enable), Ok(()));
    }
    sys::event(&vm, 0, Event::Cr.id().into()).expect("an event can be disallowed");
    assert_eq!(tool.control_cr(0, 3, 1), Err(KvmiError::Perm));
    let refused = tool.control_vcpu_event(0, Event::Cr.id(), 1);
    assert_eq!(refused, Err(KvmiError::Perm));
    vm.expect_progress();
}

fn write_is_told_before_it_takes_effect_in_each_mode(_: &Ctx) {
    for_each(|mode, cr| {
        let (vm, mut vcpu, doing) = about_to_write(mode, cr);
        let Doing::Cr { old, new, .. } = doing else {
            unreachable!()
        };
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Cr(cr)]);
        let event = tool.expect(0, doing);
        // The MOV of the value is in front of it.
        let rip = event.arch.regs.rip;
        assert!(
            rip > code_rip(mode) && rip < code_rip(mode) + 12,
            "{rip:#x}"
        );
        assert_eq!(event.arch.regs.rax, new);
        let (reply, _) = tool.registers(0, &[]).expect("registers can be read");
        let has = [reply.sregs, event.arch.sregs].map(|sregs| match cr {
            Cr::Cr0 => sregs.cr0,
            Cr::Cr3 => sregs.cr3,
            Cr::Cr4 => sregs.cr4,
        });
        assert_eq!(has, [old, old]);
        assert_eq!(reply.regs, event.arch.regs);
        tool.resume(&event);
        tool.expect_end(&mut vcpu);
        assert_eq!(read(&mut vcpu, cr), new);
    });
}

fn same_value_makes_no_event(_: &Ctx) {
    let all = Cr::ALL.map(Wish::Cr);
    for mode in [Mode::Long, Mode::Paged32, Mode::Real] {
        let (vm, mut vcpu) = code_in(mode, |code| {
            for _ in 0..3 {
                if code.bitness() == 64 {
                    emit(code.mov(rax, cr0));
                    emit(code.mov(cr0, rax));
                    emit(code.mov(rax, cr3));
                    emit(code.mov(cr3, rax));
                    emit(code.mov(rax, cr4));
                    emit(code.mov(cr4, rax));
                } else {
                    emit(code.mov(eax, cr0));
                    emit(code.mov(cr0, eax));
                    emit(code.mov(eax, cr3));
                    emit(code.mov(cr3, eax));
                    emit(code.mov(eax, cr4));
                    emit(code.mov(cr4, eax));
                }
            }
        });
        let mut tool = vm.hook_allowing_all();
        tool.expect_events(&mut vcpu, &all, &[]);
    }
}

fn only_chosen_registers_make_events(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    let [zero, three, four] = Cr::ALL.map(|cr| {
        let (old, new) = values(&vm, &mut vcpu, cr);
        Doing::Cr { cr, old, new }
    });
    let new = |doing: Doing| doing.new_value().expect("a write");
    let mut tool = vm.hook_allowing_all();
    let before = vcpu.sregs();
    let cases: [(&[Wish], &[Doing]); 6] = [
        (&[Wish::Cr(Cr::Cr3)], &[three]),
        (&[Wish::Cr(Cr::Cr0)], &[zero]),
        (&[Wish::Cr(Cr::Cr4)], &[four]),
        (&[Wish::Cr(Cr::Cr4), Wish::Cr(Cr::Cr0)], &[zero, four]),
        // One half alone is nothing.
        (&[Wish::Event(Event::Cr)], &[]),
        (&[], &[]),
    ];
    for (wishes, events) in cases {
        note!("{wishes:?}");
        let set = vcpu.with(move |fd| {
            let mut sregs = fd.get_sregs()?;
            (sregs.cr0, sregs.cr3, sregs.cr4) = (before.cr0, before.cr3, before.cr4);
            fd.set_sregs(&sregs)
        });
        set.expect("KVM_SET_SREGS");
        load(&vm, &mut vcpu, Mode::Long, |code| {
            for (cr, doing) in Cr::ALL.into_iter().zip([zero, three, four]) {
                write_cr(code, cr, new(doing));
            }
            // Here everything is taken back.
            emit(code.out(0x11, al));
        });
        tool.run_telling(&mut vcpu, wishes);
        tool.let_pass(0, events);
        assert_eq!(vcpu.exit(), Exit::Out(0x11));
        let all: Vec<_> = wishes
            .iter()
            .copied()
            .chain(Cr::ALL.map(Wish::Cr))
            .collect();
        vcpu.change_regs(|regs| regs.rip = crate::guest::SPIN_CODE);
        vcpu.run();
        tool.wish(0, &all, false);
        vcpu.stop();
    }
}

fn each_instruction_that_changes_cr0_makes_an_event(_: &Ctx) {
    for mode in [Mode::Long, Mode::Protected32, Mode::Real] {
        note!("{mode:?}");
        let mut vm = TestVm::new();
        let mut vcpu = add_vcpu(&mut vm, mode);
        let base = vcpu.sregs().cr0 & !(TS | MP_EM | WP | AM);
        let low = (base & 0xf) as u32;
        let set = vcpu.with(move |fd| {
            let mut sregs = fd.get_sregs()?;
            sregs.cr0 = base;
            fd.set_sregs(&sregs)
        });
        set.expect("KVM_SET_SREGS");
        load(&vm, &mut vcpu, mode, |code| {
            write_cr(code, Cr::Cr0, base | TS);
            emit(code.clts());
            // Nothing to clear any more.
            emit(code.clts());
            emit(code.mov(eax, low | 8));
            emit(code.lmsw(ax));
            emit(code.lmsw(ax));
            emit(code.mov(word_ptr(DATA), low | 6));
            emit(code.lmsw(word_ptr(DATA)));
            write_cr(code, Cr::Cr0, base | WP);
            write_cr(code, Cr::Cr0, base);
        });
        let values = [
            base,
            base | TS,
            base,
            base | TS,
            base | MP_EM,
            base | WP,
            base,
        ];
        let events: Vec<_> = values
            .windows(2)
            .map(|pair| Doing::Cr {
                cr: Cr::Cr0,
                old: pair[0],
                new: pair[1],
            })
            .collect();
        let mut tool = vm.hook_allowing_all();
        tool.expect_events(&mut vcpu, &[Wish::Cr(Cr::Cr0)], &events);
        assert_eq!(vcpu.sregs().cr0, base);
    }
}

fn each_bit_of_cr4_makes_an_event(_: &Ctx) {
    // TSD, DE, PGE, PCE, OSFXSR, OSXMMEXCPT: VMX could leave some of them to the guest.
    const BITS: [u64; 6] = [1 << 2, 1 << 3, 1 << 7, 1 << 8, 1 << 9, 1 << 10];
    for mode in [Mode::Long, Mode::Paged32, Mode::Real] {
        note!("{mode:?}");
        let mut vm = TestVm::new();
        let mut vcpu = add_vcpu(&mut vm, mode);
        let base = vcpu.sregs().cr4;
        let mut events = vec![];
        load(&vm, &mut vcpu, mode, |code| {
            let mut old = base;
            for bit in BITS.into_iter().chain(BITS) {
                let new = old ^ bit;
                write_cr(code, Cr::Cr4, new);
                events.push(Doing::Cr {
                    cr: Cr::Cr4,
                    old,
                    new,
                });
                old = new;
            }
        });
        let mut tool = vm.hook_allowing_all();
        tool.expect_events(&mut vcpu, &[Wish::Cr(Cr::Cr4)], &events);
        assert_eq!(vcpu.sregs().cr4, base);
    }
}

fn how_to_flush_is_no_part_of_cr3(_: &Ctx) {
    const PCID: u32 = 1 << 17;
    const PCIDE: u64 = 1 << 17;
    const NO_FLUSH: u64 = 1 << 63;
    if features_ecx() & PCID == 0 {
        skip("the CPU has no PCID");
    }
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    let (old, new) = values(&vm, &mut vcpu, Cr::Cr3);
    let extensions = vcpu.sregs().cr4;
    load(&vm, &mut vcpu, Mode::Long, |code| {
        write_cr(code, Cr::Cr4, extensions | PCIDE);
        write_cr(code, Cr::Cr3, new | NO_FLUSH);
        // The same value.
        write_cr(code, Cr::Cr3, new);
        write_cr(code, Cr::Cr3, new | NO_FLUSH);
        write_cr(code, Cr::Cr3, old | 5);
        write_cr(code, Cr::Cr3, new | NO_FLUSH | 6);
    });
    let event = |old, new| Doing::Cr {
        cr: Cr::Cr3,
        old,
        new,
    };
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[Wish::Cr(Cr::Cr3)]);
    tool.let_pass(0, &[event(old, new), event(new, old | 5)]);
    let last = tool.expect(0, event(old | 5, new | 6));
    tool.replace(&last, new | 7);
    tool.expect_end(&mut vcpu);
    assert_eq!(vcpu.sregs().cr3, new | 7);
}

fn write_that_faults_makes_no_event(_: &Ctx) {
    for mode in [Mode::Long, Mode::Protected32, Mode::Real] {
        note!("{mode:?}");
        let mut vm = TestVm::new();
        let mut vcpu = add_vcpu(&mut vm, mode);
        let before = vcpu.sregs();
        load(&vm, &mut vcpu, mode, |code| {
            // Paging without protection; a bit that no CPU has.
            let unprotected = before.cr0 & !1 | 1 << 31;
            attempt(code, |code| write_cr(code, Cr::Cr0, unprotected));
            attempt(code, |code| write_cr(code, Cr::Cr4, before.cr4 | 1 << 31));
        });
        survive(&vm, &mut vcpu, mode, 13);
        let mut tool = vm.hook_allowing_all();
        tool.expect_events(&mut vcpu, &Cr::ALL.map(Wish::Cr), &[]);
        assert_eq!(faults(&vm), 2);
        let after = vcpu.sregs();
        assert_eq!((after.cr0, after.cr4), (before.cr0, before.cr4));
    }
}

fn writes_of_the_vmm_make_no_event(_: &Ctx) {
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        emit(code.out(0x11, al));
    });
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &Cr::ALL.map(Wish::Cr));
    assert_eq!(vcpu.exit(), Exit::Out(0x11));
    let values = Cr::ALL.map(|cr| values(&vm, &mut vcpu, cr).1);
    let set = vcpu.with(move |fd| {
        let mut sregs = fd.get_sregs()?;
        [sregs.cr0, sregs.cr3, sregs.cr4] = values;
        fd.set_sregs(&sregs)
    });
    set.expect("KVM_SET_SREGS");
    vcpu.run();
    tool.expect_end(&mut vcpu);
    assert_eq!(Cr::ALL.map(|cr| read(&mut vcpu, cr)), values);
}
