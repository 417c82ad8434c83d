// SPDX-License-Identifier: GPL-2.0 OR MIT

//! HYPERCALL events: the guest calls the tool.

use std::env;

use iced_x86::code_asm::*;
use kvmi_abi::{Action, Event, KvmiError};

use crate::{
    access_tool::emit,
    event_code::{add_vcpu, code_in, is_amd, load, load_user},
    event_common::{expect_crash, expect_refused, Doing, Wish},
    guest::Mode,
    harness::{note, skip, test, Ctx, Test},
    sys,
    vcpu::{Exit, Vcpu},
    vm::TestVm,
};

const AREA: &str = "event_hypercall";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(event_can_be_switched_on_and_off),
    test!(call_is_told_and_succeeds_in_each_mode),
    test!(call_fails_without_the_event),
    test!(call_that_nobody_answers_fails),
    test!(only_the_calls_of_the_protocol_are_told),
    test!(data_goes_both_ways),
    test!(instruction_of_the_other_vendor_is_told_once),
    test!(user_space_may_call),
    test!(user_space_may_not_call_if_the_module_was_loaded_so),
    test!(calls_of_user_space_are_limited),
    test!(calls_of_the_kernel_are_not_limited),
    test!(retry_is_refused),
    test!(crash_ends_kvm_run),
    test!(next_tool_is_told_nothing),
];

const WISH: Wish = Wish::Event(Event::Hypercall);
/// `-KVM_ENOSYS`
const NO_SYS: i64 = -1000;

/// The hypercall instruction, of the host's CPU or of the other vendor's.
fn instruction(code: &mut CodeAssembler, own: bool) {
    emit(if is_amd() == own {
        code.vmmcall()
    } else {
        code.vmcall()
    });
}

/// What the protocol has for arguments.
fn arguments(code: &mut CodeAssembler) {
    if code.bitness() == 64 {
        emit(code.mov(rax, 34u64));
        emit(code.mov(rdi, 24u64));
        emit(code.xor(rsi, rsi));
    } else {
        emit(code.mov(eax, 34));
        emit(code.mov(ebx, 24));
        emit(code.xor(ecx, ecx));
    }
}

/// Calls the tool: changes RAX, RDI and RSI in 64-bit mode.
pub fn call(code: &mut CodeAssembler) {
    arguments(code);
    instruction(code, true);
}

/// What the guest gets for a result in a mode.
fn result(mode: Mode, value: i64) -> u64 {
    match mode {
        Mode::Long => value as u64,
        _ => u64::from(value as u32),
    }
}

fn event_can_be_switched_on_and_off(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let id = Event::Hypercall.id();
    for enable in [0, 1, 1, 0, 0, 1] {
        assert_eq!(tool.control_vcpu_event(0, id, enable), Ok(()));
    }
    sys::event(&vm, 0, id.into()).expect("an event can be disallowed");
    assert_eq!(tool.control_vcpu_event(0, id, 1), Err(KvmiError::Perm));
    vm.expect_progress();
}

fn call_is_told_and_succeeds_in_each_mode(_: &Ctx) {
    for (mode, _) in Mode::ALL {
        note!("{mode:?}");
        let (vm, mut vcpu) = code_in(mode, call);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[WISH]);
        let event = tool.expect(0, Doing::Hypercall);
        assert_eq!(event.arch.regs.rax, 34);
        tool.resume(&event);
        tool.expect_end(&mut vcpu);
        let regs = vcpu.regs();
        assert_eq!(regs.rax, 0);
        // Nothing else changes.
        let before = event.arch.regs;
        assert_eq!(
            (regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi),
            (before.rbx, before.rcx, before.rdx, before.rsi, before.rdi)
        );
    }
}

fn call_fails_without_the_event(_: &Ctx) {
    for (mode, _) in Mode::ALL {
        note!("{mode:?}");
        let (vm, mut vcpu) = code_in(mode, call);
        let mut tool = vm.hook_allowing_all();
        tool.expect_events(&mut vcpu, &[], &[]);
        assert_eq!(vcpu.regs().rax, result(mode, NO_SYS));
    }
    // Nor with a tool that is gone.
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        call(code);
        emit(code.mov(r8, rax));
        emit(code.out(0x11, al));
        call(code);
    });
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    tool.let_pass(0, &[Doing::Hypercall]);
    assert_eq!(vcpu.exit(), Exit::Out(0x11));
    vm.unhook();
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10));
    let regs = vcpu.regs();
    assert_eq!((regs.r8, regs.rax as i64), (0, NO_SYS));
}

fn call_that_nobody_answers_fails(_: &Ctx) {
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        emit(code.out(0x11, al));
        call(code);
    });
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    assert_eq!(vcpu.exit(), Exit::Out(0x11));
    sys::event(&vm, 0, Event::Hypercall.id().into()).expect("an event can be disallowed");
    vcpu.run();
    tool.expect_end(&mut vcpu);
    assert_eq!(vcpu.regs().rax as i64, NO_SYS);
}

fn only_the_calls_of_the_protocol_are_told(_: &Ctx) {
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        const OTHERS: [(u64, u64, u64); 6] = [
            (34, 24, 1),
            (34, 23, 0),
            (33, 24, 0),
            (34 | 1 << 40, 24, 0),
            (34, 24 | 1 << 32, 0),
            (34, 24, 1 << 63),
        ];
        for (number, first, second) in OTHERS {
            emit(code.mov(rax, number));
            emit(code.mov(rdi, first));
            emit(code.mov(rsi, second));
            // What 32-bit code has.
            emit(code.mov(rbx, 24u64));
            emit(code.xor(rcx, rcx));
            instruction(code, true);
            // All fail.
            emit(code.mov(rdx, rax));
            emit(code.cmp(rdx, -1000));
            let mut fine = code.create_label();
            emit(code.je(fine));
            emit(code.out(0x13, al));
            emit(code.set_label(&mut fine));
            emit(code.nop());
        }
    });
    let mut tool = vm.hook_allowing_all();
    tool.expect_events(&mut vcpu, &[WISH], &[]);
}

fn data_goes_both_ways(_: &Ctx) {
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        emit(code.mov(rdx, 0x1111u64));
        emit(code.mov(r8, 0x2222u64));
        emit(code.mov(r9, 0x3333u64));
        emit(code.mov(r10, 0x4444u64));
        call(code);
    });
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    let event = tool.expect(0, Doing::Hypercall);
    let mut regs = event.arch.regs;
    assert_eq!(
        (regs.rdx, regs.r8, regs.r9, regs.r10),
        (0x1111, 0x2222, 0x3333, 0x4444)
    );
    (regs.rdx, regs.r8, regs.r9, regs.r10) = (5, 6, 7, 8);
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    tool.resume(&event);
    tool.expect_end(&mut vcpu);
    let regs = vcpu.regs();
    assert_eq!(
        (regs.rax, regs.rdx, regs.r8, regs.r9, regs.r10),
        (0, 5, 6, 7, 8)
    );
}

fn instruction_of_the_other_vendor_is_told_once(_: &Ctx) {
    // KVM replaces it by the right one.
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        arguments(code);
        instruction(code, false);
    });
    let mut tool = vm.hook_allowing_all();
    tool.expect_events(&mut vcpu, &[WISH], &[Doing::Hypercall]);
    assert_eq!(vcpu.regs().rax, 0);
}

/// A VM with a vCPU that calls from user space, `rounds` times, and adds up the results in R8.
fn calling_from_user_space(rounds: u32) -> (TestVm, Vcpu) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    load_user(&vm, &mut vcpu, |code| {
        emit(code.xor(r8, r8));
        emit(code.mov(ebx, rounds));
        let mut again = code.create_label();
        emit(code.set_label(&mut again));
        call(code);
        emit(code.add(r8, rax));
        emit(code.dec(ebx));
        emit(code.jne(again));
    });
    (vm, vcpu)
}

fn user_space_may_call(_: &Ctx) {
    let (vm, mut vcpu) = calling_from_user_space(3);
    let mut tool = vm.hook_allowing_all();
    tool.expect_events(&mut vcpu, &[WISH], &[Doing::Hypercall; 3]);
    assert_eq!(vcpu.regs().r8, 0);
}

fn user_space_may_not_call_if_the_module_was_loaded_so(_: &Ctx) {
    if env::var("hypercall_user").as_deref() != Ok("0") {
        skip("the module was loaded without hypercall_user=0");
    }
    let (vm, mut vcpu) = calling_from_user_space(3);
    let mut tool = vm.hook_allowing_all();
    tool.expect_events(&mut vcpu, &[WISH], &[]);
    assert_eq!(vcpu.regs().r8 as i64, 3 * NO_SYS);
    // CPL 0 is not concerned.
    load(&vm, &mut vcpu, Mode::Long, call);
    tool.expect_events(&mut vcpu, &[], &[Doing::Hypercall]);
    assert_eq!(vcpu.regs().rax, 0);
}

fn calls_of_user_space_are_limited(_: &Ctx) {
    // The module's parameter; who loads the module knows if it is not the default.
    let rate = env::var("hypercall_rate").ok();
    let rate = rate.map_or(1000, |rate| rate.parse().expect("a number"));
    let calls = 2 * rate;
    let (vm, mut vcpu) = calling_from_user_space(calls);
    let mut tool = vm.hook_allowing_all();
    let start = std::time::Instant::now();
    tool.run_telling(&mut vcpu, &[WISH]);
    let told = tool.let_all_pass(&mut vcpu);
    let seconds = start.elapsed().as_secs() + 2;
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    note!("{told} of {calls} calls in less than {seconds} s");
    let refused = i64::from(calls) - i64::try_from(told).expect("a number of calls");
    assert_eq!(vcpu.regs().r8 as i64, refused * NO_SYS);
    assert!(told <= u64::from(rate) * seconds);
    if refused == 0 {
        skip("this machine does not make so many calls");
    }
}

fn calls_of_the_kernel_are_not_limited(_: &Ctx) {
    const CALLS: u32 = 2500;
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        emit(code.mov(ebx, CALLS));
        let mut again = code.create_label();
        emit(code.set_label(&mut again));
        call(code);
        emit(code.or(r8, rax));
        emit(code.dec(ebx));
        emit(code.jne(again));
    });
    vcpu.change_regs(|regs| regs.r8 = 0);
    let mut tool = vm.hook_allowing_all();
    let events = vec![Doing::Hypercall; CALLS as usize];
    tool.expect_events(&mut vcpu, &[WISH], &events);
    assert_eq!(vcpu.regs().r8, 0);
}

/// A VM with a vCPU that is asked about its call.
fn calling() -> (TestVm, Vcpu) {
    code_in(Mode::Long, call)
}

fn retry_is_refused(_: &Ctx) {
    let (vm, mut vcpu) = calling();
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    let event = tool.expect(0, Doing::Hypercall);
    expect_refused(tool, &mut vcpu, &event, Action::Retry);
}

fn crash_ends_kvm_run(_: &Ctx) {
    let (vm, mut vcpu) = calling();
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    let event = tool.expect(0, Doing::Hypercall);
    expect_crash(&mut tool, &mut vcpu, &event);
    assert_eq!(vcpu.regs().rax, 34);
}

fn next_tool_is_told_nothing(_: &Ctx) {
    for unhook in [true, false] {
        let (vm, mut vcpu) = calling();
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[WISH]);
        tool.expect(0, Doing::Hypercall);
        // In the middle of the event.
        if unhook {
            vm.unhook();
        } else {
            drop(tool.disconnect());
        }
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        assert_eq!(vcpu.regs().rax as i64, NO_SYS);
        if !unhook {
            vm.unhook();
        }
        let mut next = vm.hook_allowing_all();
        load(&vm, &mut vcpu, Mode::Long, call);
        next.expect_events(&mut vcpu, &[], &[]);
        assert_eq!(vcpu.regs().rax as i64, NO_SYS);
    }
}
