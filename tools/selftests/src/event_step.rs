// SPDX-License-Identifier: GPL-2.0 OR MIT

//! SINGLESTEP events: one after each instruction, whoever executes it.

use iced_x86::code_asm::*;
use kvmi_abi::{vcpu::InjectException, Action, Command, Event, KvmiError};

use crate::{
    access_tool::emit,
    event_code::{add_vcpu, load, CODE, DATA},
    event_common::{expect_crash, expect_refused, Wish, STEP},
    guest::Mode,
    harness::{note, skip, test, Ctx, Test},
    sys,
    tool::Tool,
    vcpu::{Exit, Vcpu},
    vm::{TestVm, SCRATCH},
};

const AREA: &str = "event_step";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(arguments_are_checked),
    test!(each_instruction_makes_an_event_in_each_mode),
    test!(branches_are_followed),
    test!(instruction_that_jumps_to_itself_makes_an_event_each_time),
    test!(registers_can_be_set_after_a_step),
    test!(exceptions_cannot_be_injected_meanwhile),
    test!(stepping_ends_when_it_is_switched_off),
    test!(stepping_ends_with_the_tool),
    test!(retry_is_refused),
    test!(crash_ends_kvm_run),
    test!(signals_lose_no_step),
    test!(one_vcpu_is_stepped_and_others_run),
];

/// Skips the test where the CPU cannot stop after each instruction.
fn need_steps(tool: &mut Tool) {
    if tool.version().features.singlestep == 0 {
        skip("the CPU cannot single-step");
    }
}

/// Hooks a VM to a tool that is about to single-step.
pub fn hook(vm: &TestVm) -> Tool {
    let mut tool = vm.hook_allowing_all();
    need_steps(&mut tool);
    tool
}

/// Lets a vCPU go on instruction by instruction until it is about to execute what is at `end`;
/// returns where it was after each.
#[track_caller]
pub fn trace(tool: &mut Tool, vcpu: u16, end: u64) -> Vec<u64> {
    let mut rips = vec![];
    while rips.last() != Some(&end) {
        let event = tool.expect(vcpu, STEP);
        rips.push(event.arch.regs.rip);
        assert!(rips.len() < 100_000, "it does not get to {end:#x}");
        tool.resume(&event);
    }
    rips
}

/// Steps over code to its end; fails the test unless the guest is at these instructions.
#[track_caller]
pub fn expect_trace(vm: &TestVm, vcpu: &mut Vcpu, expected: &[u64]) {
    let mut tool = hook(vm);
    tool.run_telling(vcpu, &[Wish::Step]);
    let end = *expected.last().expect("some instructions");
    let rips = trace(&mut tool, vcpu.index, end);
    assert_eq!(format!("{rips:#x?}"), format!("{expected:#x?}"));
    tool.expect_end(vcpu);
}

/// A VM with one vCPU that is about to run this code; returns where its instructions are, too.
pub fn code_in(mode: Mode, write: impl FnOnce(&mut CodeAssembler)) -> (TestVm, Vcpu, Vec<u64>) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, mode);
    let rips = load(&vm, &mut vcpu, mode, write);
    (vm, vcpu, rips)
}

/// Code that does nothing.
pub fn nops(code: &mut CodeAssembler, count: usize) {
    for _ in 0..count {
        emit(code.nop());
    }
}

fn arguments_are_checked(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let fine = match tool.version().features.singlestep {
        0 => Err(KvmiError::OpNotSupp),
        _ => Ok(()),
    };
    assert_eq!(tool.control_step(0, 0), fine);
    for enable in [2, 0x80, 0xff] {
        assert_eq!(tool.control_step(0, enable), Err(KvmiError::Inval));
    }
    for at in 1..8 {
        let mut request = [0; 8];
        request[at] = 1;
        let refused = tool.call_vcpu(0, Command::VcpuControlSinglestep, &request);
        assert_eq!(refused, Err(KvmiError::Inval), "byte {at}");
    }
    // The event itself has no switch that matters.
    let id = Event::Singlestep.id();
    assert_eq!(tool.control_vcpu_event(0, id, 1), Ok(()));
    assert_eq!(tool.control_vcpu_event(0, id, 0), Ok(()));
    sys::event(&vm, 0, id.into()).expect("an event can be disallowed");
    for enable in [0, 1, 2] {
        assert_eq!(tool.control_step(0, enable), Err(KvmiError::Perm));
    }
    vm.expect_progress();
}

fn each_instruction_makes_an_event_in_each_mode(_: &Ctx) {
    for (mode, _) in Mode::ALL {
        note!("{mode:?}");
        let (vm, mut vcpu, rips) = code_in(mode, |code| {
            emit(code.mov(ax, 5));
            emit(code.inc(ax));
            emit(code.push(ax));
            emit(code.pop(cx));
            emit(code.mov(word_ptr(DATA), cx));
            match code.bitness() {
                64 => {
                    emit(code.pushfq());
                    emit(code.pop(rdx));
                }
                32 => {
                    emit(code.pushfd());
                    emit(code.pop(edx));
                }
                _ => {
                    emit(code.pushf());
                    emit(code.pop(dx));
                }
            }
            emit(code.add(word_ptr(DATA), ax));
            emit(code.cld());
            emit(code.lea(cx, word_ptr(DATA)));
            emit(code.nop());
        });
        expect_trace(&vm, &mut vcpu, &rips[1..]);
        assert_eq!(vm.memory.read(DATA, 2), [12, 0]);
        assert_eq!(vcpu.regs().rdx & 0x300, 0x200, "TF is seen");
        assert_eq!(vm.record(0).count, 0);
    }
}

fn branches_are_followed(_: &Ctx) {
    let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| {
        let mut again = code.create_label();
        let mut over = code.create_label();
        let mut function = code.create_label();
        let mut end = code.create_label();
        emit(code.mov(ecx, 2)); // 0
        emit(code.set_label(&mut again));
        emit(code.dec(ecx)); // 1
        emit(code.jne(again)); // 2
        emit(code.jmp(over)); // 3
        emit(code.nop()); // 4
        emit(code.set_label(&mut over));
        emit(code.call(function)); // 5
        emit(code.jmp(end)); // 6
        emit(code.set_label(&mut function));
        emit(code.lea(rax, qword_ptr(function))); // 7
        emit(code.ret()); // 8
        emit(code.set_label(&mut end));
        emit(code.nop()); // 9
    });
    let order = [1, 2, 1, 2, 3, 5, 7, 8, 6, 9, 10].map(|nth: usize| rips[nth]);
    expect_trace(&vm, &mut vcpu, &order);
}

fn instruction_that_jumps_to_itself_makes_an_event_each_time(_: &Ctx) {
    let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| {
        let mut here = code.create_label();
        emit(code.nop());
        emit(code.set_label(&mut here));
        emit(code.jmp(here));
    });
    let mut tool = hook(&vm);
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    for seq in 1..=20 {
        let event = tool.expect(0, STEP);
        let mut regs = event.arch.regs;
        assert_eq!((event.seq, regs.rip), (seq, rips[1]));
        if seq == 20 {
            regs.rip = rips[2];
            assert_eq!(tool.set_regs(0, &regs), Ok(()));
        }
        tool.resume(&event);
    }
    tool.expect_end(&mut vcpu);
}

fn registers_can_be_set_after_a_step(_: &Ctx) {
    let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| {
        emit(code.mov(eax, 1));
        emit(code.mov(eax, 2));
        emit(code.nop());
    });
    let mut tool = hook(&vm);
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    let event = tool.expect(0, STEP);
    let mut regs = event.arch.regs;
    assert_eq!((regs.rip, regs.rax), (rips[1], 1));
    (regs.rip, regs.r15) = (rips[2], 15);
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    tool.resume(&event);
    assert_eq!(trace(&mut tool, 0, rips[3]), [rips[3]]);
    tool.expect_end(&mut vcpu);
    assert_eq!((vcpu.regs().rax & 0xff, vcpu.regs().r15), (1, 15));
}

fn exceptions_cannot_be_injected_meanwhile(_: &Ctx) {
    let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| nops(code, 3));
    let mut tool = hook(&vm);
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    let event = tool.expect(0, STEP);
    let exception = InjectException {
        nr: 6,
        ..Default::default()
    };
    assert_eq!(tool.inject(0, exception), Err(KvmiError::Busy));
    tool.resume(&event);
    let event = tool.expect(0, STEP);
    assert_eq!(event.arch.regs.rip, rips[2]);
    assert_eq!(tool.control_step(0, 0), Ok(()));
    tool.resume(&event);
    tool.expect_end(&mut vcpu);
    assert_eq!(vm.record(0).count, 0);
}

fn stepping_ends_when_it_is_switched_off(_: &Ctx) {
    for steps in 1..=8 {
        let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| {
            nops(code, 2);
            emit(code.pushfq());
            emit(code.pop(rdx));
            emit(code.int(9));
            nops(code, 2);
        });
        let mut tool = hook(&vm);
        tool.run_telling(&mut vcpu, &[Wish::Step, Wish::Step]);
        for nth in 1..=steps {
            let event = tool.expect(0, STEP);
            // Up to INT, and then the handler.
            let rip = event.arch.regs.rip;
            assert_eq!(rips.get(nth) == Some(&rip), nth <= 4, "{rip:#x}");
            if nth == steps {
                assert_eq!(tool.control_step(0, 0), Ok(()));
                assert_eq!(tool.control_step(0, 0), Ok(()));
            }
            tool.resume(&event);
        }
        tool.expect_end(&mut vcpu);
        assert_eq!(vcpu.regs().rdx & 0x300, 0x200, "TF is seen");
        let record = vm.record(0);
        assert_eq!((record.vector, record.count), (9, 1));
    }
}

fn stepping_ends_with_the_tool(_: &Ctx) {
    for unhook in [true, false] {
        for steps in 1..=8 {
            let (vm, mut vcpu, _) = code_in(Mode::Long, |code| {
                nops(code, 2);
                emit(code.pushfq());
                emit(code.pop(rdx));
                emit(code.int(9));
                nops(code, 2);
            });
            let mut tool = hook(&vm);
            tool.run_telling(&mut vcpu, &[Wish::Step]);
            for _ in 1..steps {
                let event = tool.expect(0, STEP);
                tool.resume(&event);
            }
            tool.expect(0, STEP);
            if unhook {
                vm.unhook();
            } else {
                drop(tool.disconnect());
            }
            assert_eq!(vcpu.exit(), Exit::Out(0x10));
            assert_eq!(vcpu.regs().rdx & 0x300, 0x200, "TF is seen");
            assert_eq!((vm.record(0).vector, vm.record(0).count), (9, 1));
            if !unhook {
                vm.unhook();
            }
            let mut next = vm.hook_allowing_all();
            vcpu.change_regs(|regs| regs.rip = CODE);
            next.expect_events(&mut vcpu, &[], &[]);
            assert_eq!(vm.record(0).count, 2);
        }
    }
}

fn retry_is_refused(_: &Ctx) {
    let (vm, mut vcpu, _) = code_in(Mode::Long, |code| nops(code, 3));
    let mut tool = hook(&vm);
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    let event = tool.expect(0, STEP);
    expect_refused(tool, &mut vcpu, &event, Action::Retry);
}

fn crash_ends_kvm_run(_: &Ctx) {
    let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| nops(code, 3));
    let mut tool = hook(&vm);
    tool.run_telling(&mut vcpu, &[Wish::Step]);
    let event = tool.expect(0, STEP);
    assert_eq!(event.arch.regs.rip, rips[1]);
    expect_crash(&mut tool, &mut vcpu, &event);
}

fn signals_lose_no_step(_: &Ctx) {
    let (vm, mut vcpu, rips) = code_in(Mode::Long, |code| {
        for _ in 0..20 {
            emit(code.inc(rax));
            emit(code.cpuid());
            emit(code.pushfq());
            emit(code.pop(rdx));
        }
    });
    let mut tool = hook(&vm);
    let sent = tool.send_wishes(0, &[Wish::Step]);
    tool.settle();
    vcpu.run_through();
    for (command, seq) in sent {
        assert_eq!(tool.reply_to(command.id(), seq), Ok(vec![]));
    }
    for rip in &rips[1..] {
        vcpu.signal();
        let event = tool.expect(0, STEP);
        assert_eq!(event.arch.regs.rip, *rip);
        vcpu.signal();
        tool.resume(&event);
    }
    tool.expect_end(&mut vcpu);
}

fn one_vcpu_is_stepped_and_others_run(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpus = [(); 2].map(|()| add_vcpu(&mut vm, Mode::Long));
    let rips = [0, 1].map(|index: usize| {
        load(&vm, &mut vcpus[index], Mode::Long, |code| {
            emit(code.mov(byte_ptr(SCRATCH + index as u64), 1));
            nops(code, 10);
        })
    });
    let mut tool = hook(&vm);
    let [first, second] = &mut vcpus;
    tool.run_telling(first, &[Wish::Step]);
    let event = tool.expect(0, STEP);
    assert_eq!(second.run_until_exit(), Exit::Out(0x10));
    // Both at once.
    second.change_regs(|regs| regs.rip = rips[1][0]);
    tool.run_telling(second, &[Wish::Step]);
    let other = tool.expect(1, STEP);
    tool.resume(&event);
    assert_eq!(trace(&mut tool, 0, rips[0][11]), rips[0][2..]);
    assert_eq!(first.exit(), Exit::Out(0x10));
    assert_eq!(other.arch.regs.rip, rips[1][1]);
    tool.resume(&other);
    assert_eq!(trace(&mut tool, 1, rips[1][11]), rips[1][2..]);
    tool.expect_end(second);
}
