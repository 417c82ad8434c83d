// SPDX-License-Identifier: GPL-2.0 OR MIT

//! XSETBV events: the guest writes XCR0, and the tool is told before.

use std::sync::OnceLock;

use iced_x86::code_asm::*;
use kvmi_abi::{guest_event::Cr, Action, Event, KvmiError};

use crate::{
    access_tool::emit,
    event_code::{
        add_vcpu, attempt, faults, features_ecx, is_tcg, load, survive, write_cr, write_xcr,
    },
    event_common::{expect_crash, expect_refused, Doing, Wish},
    guest::Mode,
    harness::{note, skip, test, Ctx, Test},
    sys,
    vcpu::{Exit, Vcpu},
    vm::TestVm,
};

const AREA: &str = "event_xsetbv";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(event_can_be_switched_on_and_off),
    test!(write_is_told_before_it_takes_effect_in_each_mode),
    test!(same_value_makes_no_event),
    test!(write_that_faults_makes_no_event),
    test!(registers_set_elsewhere_skip_the_write),
    test!(retry_is_refused),
    test!(crash_ends_kvm_run),
    test!(writes_of_the_vmm_make_no_event),
    test!(next_tool_is_told_nothing),
];

const WISH: Wish = Wish::Event(Event::Xsetbv);
const OSXSAVE: u64 = 1 << 18;
/// XCR0: x87 alone, and SSE, too.
const X87: u64 = 1;
const SSE: u64 = 3;

/// A VM with one vCPU that is about to run this code, with XSETBV there.
fn code_in(mode: Mode, write: impl FnOnce(&mut CodeAssembler)) -> (TestVm, Vcpu) {
    need_interception();
    writing(mode, write)
}

/// Skips the test where the CPU does not tell KVM of an XSETBV.
pub fn need_interception() {
    const XSAVE: u32 = 1 << 26;
    static INTERCEPTED: OnceLock<bool> = OnceLock::new();
    if features_ecx() & XSAVE == 0 {
        skip("the CPU has no XSAVE");
    }
    if !INTERCEPTED.get_or_init(is_intercepted) {
        skip("QEMU's CPU does not tell KVM of an XSETBV");
    }
}

/// Whether KVM notices an XSETBV: QEMU's CPU does not know this intercept.
fn is_intercepted() -> bool {
    let (_vm, mut vcpu) = writing(Mode::Long, |code| write_xcr(code, 0, SSE));
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10));
    let noticed = xcr0(&mut vcpu) == SSE;
    assert!(noticed || is_tcg());
    noticed
}

fn writing(mode: Mode, write: impl FnOnce(&mut CodeAssembler)) -> (TestVm, Vcpu) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, mode);
    let extensions = vcpu.sregs().cr4 | OSXSAVE;
    load(&vm, &mut vcpu, mode, |code| {
        write_cr(code, Cr::Cr4, extensions);
        write(code);
    });
    (vm, vcpu)
}

fn xcr0(vcpu: &mut Vcpu) -> u64 {
    let xcrs = vcpu.with(|fd| fd.get_xcrs()).expect("KVM_GET_XCRS");
    assert_eq!((xcrs.nr_xcrs, xcrs.xcrs[0].xcr), (1, 0));
    xcrs.xcrs[0].value
}

fn event_can_be_switched_on_and_off(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let id = Event::Xsetbv.id();
    for enable in [1, 1, 0, 0, 1] {
        assert_eq!(tool.control_vcpu_event(0, id, enable), Ok(()));
    }
    assert_eq!(tool.control_vcpu_event(0, id, 2), Err(KvmiError::Inval));
    sys::event(&vm, 0, id.into()).expect("an event can be disallowed");
    assert_eq!(tool.control_vcpu_event(0, id, 1), Err(KvmiError::Perm));
    vm.expect_progress();
}

fn write_is_told_before_it_takes_effect_in_each_mode(_: &Ctx) {
    for (mode, _) in Mode::ALL {
        note!("{mode:?}");
        let (vm, mut vcpu) = code_in(mode, |code| {
            write_xcr(code, 0, SSE);
            write_xcr(code, 0, X87);
            write_xcr(code, 0, SSE);
        });
        assert_eq!(xcr0(&mut vcpu), X87);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[WISH]);
        for (old, new) in [(X87, SSE), (SSE, X87), (X87, SSE)] {
            let event = tool.expect(0, Doing::Xsetbv { old, new });
            assert_eq!(event.arch.regs.rax, new);
            assert_eq!(tool.xcr0(0), old);
            tool.resume(&event);
        }
        tool.expect_end(&mut vcpu);
        assert_eq!(xcr0(&mut vcpu), SSE);
    }
}

fn same_value_makes_no_event(_: &Ctx) {
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        write_xcr(code, 0, X87);
        write_xcr(code, 0, SSE);
        write_xcr(code, 0, SSE);
    });
    let mut tool = vm.hook_allowing_all();
    let event = Doing::Xsetbv { old: X87, new: SSE };
    tool.expect_events(&mut vcpu, &[WISH], &[event]);
}

fn write_that_faults_makes_no_event(_: &Ctx) {
    for mode in [Mode::Long, Mode::Protected32, Mode::Real] {
        note!("{mode:?}");
        let (vm, mut vcpu) = code_in(mode, |code| {
            // Without x87; AVX without SSE; what no CPU has; another register.
            attempt(code, |code| write_xcr(code, 0, 0));
            attempt(code, |code| write_xcr(code, 0, 5));
            attempt(code, |code| write_xcr(code, 0, 1 << 62 | 1));
            attempt(code, |code| write_xcr(code, 1, 1));
        });
        survive(&vm, &mut vcpu, mode, 13);
        let mut tool = vm.hook_allowing_all();
        tool.expect_events(&mut vcpu, &[WISH], &[]);
        assert_eq!(faults(&vm), 4);
        assert_eq!(xcr0(&mut vcpu), X87);
    }
}

/// A VM with one vCPU that writes [`SSE`] to XCR0.
fn about_to_write() -> (TestVm, Vcpu, Doing) {
    let (vm, vcpu) = code_in(Mode::Long, |code| write_xcr(code, 0, SSE));
    (vm, vcpu, Doing::Xsetbv { old: X87, new: SSE })
}

fn registers_set_elsewhere_skip_the_write(_: &Ctx) {
    let (vm, mut vcpu, doing) = about_to_write();
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    let event = tool.expect(0, doing);
    let mut regs = event.arch.regs;
    // xsetbv
    regs.rip += 3;
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    tool.resume(&event);
    tool.expect_end(&mut vcpu);
    assert_eq!(xcr0(&mut vcpu), X87);
}

fn retry_is_refused(_: &Ctx) {
    let (vm, mut vcpu, doing) = about_to_write();
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    let event = tool.expect(0, doing);
    expect_refused(tool, &mut vcpu, &event, Action::Retry);
    assert_eq!(xcr0(&mut vcpu), SSE);
}

fn crash_ends_kvm_run(_: &Ctx) {
    let (vm, mut vcpu, doing) = about_to_write();
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    let event = tool.expect(0, doing);
    expect_crash(&mut tool, &mut vcpu, &event);
    assert_eq!(xcr0(&mut vcpu), X87);
}

fn writes_of_the_vmm_make_no_event(_: &Ctx) {
    let (vm, mut vcpu) = code_in(Mode::Long, |code| emit(code.out(0x11, al)));
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    assert_eq!(vcpu.exit(), Exit::Out(0x11));
    let set = vcpu.with(|fd| {
        let mut xcrs = fd.get_xcrs()?;
        xcrs.xcrs[0].value = SSE;
        fd.set_xcrs(&xcrs)
    });
    set.expect("KVM_SET_XCRS");
    vcpu.run();
    tool.expect_end(&mut vcpu);
    assert_eq!(xcr0(&mut vcpu), SSE);
}

fn next_tool_is_told_nothing(_: &Ctx) {
    for unhook in [true, false] {
        let (vm, mut vcpu, doing) = about_to_write();
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[WISH]);
        tool.expect(0, doing);
        // In the middle of the event.
        if unhook {
            vm.unhook();
        } else {
            drop(tool.disconnect());
        }
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        assert_eq!(xcr0(&mut vcpu), SSE);
        if !unhook {
            vm.unhook();
        }
        let mut next = vm.hook_allowing_all();
        load(&vm, &mut vcpu, Mode::Long, |code| write_xcr(code, 0, X87));
        next.expect_events(&mut vcpu, &[], &[]);
        assert_eq!(xcr0(&mut vcpu), X87);
    }
}
