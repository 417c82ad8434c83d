// SPDX-License-Identifier: GPL-2.0 OR MIT

//! GET_REGISTERS and SET_REGISTERS.

use kvmi_abi::{
    arch::Regs,
    vcpu::{GetRegistersReply, MsrEntry},
    wire::{ErrorCode, MAX_MSG_SIZE},
    Action, Command, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    guest::{odd_values, Mode, OUT_CODE, SPIN_CODE},
    harness::{test, Ctx, Test},
    util::wait_for,
    vcpu::{Exit, Vcpu},
    vcpu_tool::{comparable, msr_request},
    vm::{Guest, TestVm},
};

const AREA: &str = "registers";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(registers_are_those_of_kvm),
    test!(mode_follows_from_the_code_segment),
    test!(msrs_are_those_of_kvm_in_the_order_of_the_request),
    test!(msr_that_cannot_be_read_is_invalid),
    test!(msr_list_must_be_there_and_fit_the_reply),
    test!(setting_needs_an_event),
    test!(set_registers_take_effect_after_the_reply),
    test!(last_set_registers_win),
    test!(set_registers_move_the_guest),
    test!(set_registers_must_be_complete),
    test!(set_registers_are_dropped_without_a_reply),
    test!(set_registers_survive_a_signal),
    test!(set_registers_concern_one_vcpu),
];

const SPIN: Guest = Guest::Spin(Mode::Long);

pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
/// RFLAGS.RF, which exits may set or clear.
pub const RF: u64 = 1 << 16;

/// Registers of a guest that has run in between, to be compared.
fn without_rf(mut regs: Regs) -> Regs {
    regs.rflags &= !RF;
    regs
}

/// A VM with one vCPU that spins with odd values in its registers.
fn odd_vm() -> (TestVm, Vcpu) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(SPIN);
    vcpu.change_regs(odd_values);
    (vm, vcpu)
}

fn registers_are_those_of_kvm(_: &Ctx) {
    let (vm, mut vcpu) = odd_vm();
    let mut tool = vm.hook_allowing_all();
    for _ in 0..5 {
        vcpu.run();
        let (reply, _) = tool.registers(0, &[]).expect("registers can be read");
        vcpu.stop();
        let (regs, sregs) = (vcpu.regs(), vcpu.sregs());
        assert_eq!(
            (regs.rip, regs.r15),
            (SPIN_CODE, 0x1111_2222_3333_0000 * 12 + 12)
        );
        assert_eq!(without_rf(reply.regs), without_rf(regs));
        assert_eq!(reply.sregs, sregs);
        assert_eq!(reply.mode, 8);
        vcpu.change_regs(|regs| (regs.rax, regs.rcx) = (regs.rcx, regs.rax + 1));
    }
}

fn mode_follows_from_the_code_segment(_: &Ctx) {
    for (mode, size) in Mode::ALL {
        let mut vm = TestVm::new();
        let mut vcpu = vm.control(Guest::Spin(mode));
        let mut tool = vm.hook_allowing_all();
        vcpu.run();
        let (reply, _) = tool.registers(0, &[]).expect("registers can be read");
        assert_eq!(
            (reply.mode, reply.regs.rip),
            (size.into(), SPIN_CODE),
            "{mode:?}"
        );
        let paused = tool.pause(0);
        assert_eq!(paused.arch.mode, size, "{mode:?}");
        tool.resume(&paused);
        vcpu.stop();
        assert_eq!(
            comparable(mode, reply.sregs),
            comparable(mode, vcpu.sregs()),
            "{mode:?}"
        );
    }
}

fn msrs_are_those_of_kvm_in_the_order_of_the_request(_: &Ctx) {
    let (vm, mut vcpu) = odd_vm();
    vcpu.set_msrs(&[
        (STAR, 0x1234_5678_0000_0000),
        (LSTAR, 0xffff_8000_1234_5678),
    ]);
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let list = [LSTAR, EFER, STAR, LSTAR, 0x277];
    let (reply, msrs) = tool.registers(0, &list).expect("these can be read");
    vcpu.stop();
    assert_eq!(reply.sregs, vcpu.sregs());
    assert_eq!(msrs[1].data, reply.sregs.efer);
    for (index, msr) in list.into_iter().zip(msrs) {
        let expected = MsrEntry {
            index,
            reserved: 0,
            data: vcpu.msr(index),
        };
        assert_eq!(msr, expected);
    }
    assert_eq!(vcpu.msr(LSTAR), 0xffff_8000_1234_5678);
}

fn msr_that_cannot_be_read_is_invalid(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    const UNKNOWN: u32 = 0xdead_beef;
    for list in [&[UNKNOWN][..], &[EFER, UNKNOWN], &[UNKNOWN, EFER]] {
        let reply = tool.registers(0, list);
        assert_eq!(reply, Err(KvmiError::Inval), "{list:x?}");
    }
    assert!(tool.registers(0, &[EFER]).is_ok());
}

fn msr_list_must_be_there_and_fit_the_reply(_: &Ctx) {
    const MOST: usize =
        (MAX_MSG_SIZE - size_of::<ErrorCode>() - size_of::<GetRegistersReply>()) / 16;
    assert_eq!(MOST, 481);
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let (_, msrs) = tool.registers(0, &[EFER; MOST]).expect("481 fit");
    assert!(msrs.iter().all(|msr| *msr == msrs[0]));
    let too_many = tool.registers(0, &[EFER; MOST + 1]);
    assert_eq!(too_many, Err(KvmiError::Inval));
    // Announced but not there; a half one does not count.
    let request = msr_request(&[EFER, STAR, LSTAR]);
    for missing in 1..=12 {
        let cut = &request[..request.len() - missing];
        let reply = tool.call_vcpu(0, Command::VcpuGetRegisters, cut);
        assert_eq!(reply, Err(KvmiError::Inval), "{missing} bytes missing");
    }
    // There but not announced.
    let mut surplus = request.clone();
    surplus.extend([0xff; 100]);
    let reply = tool.call_vcpu(0, Command::VcpuGetRegisters, &surplus);
    assert_eq!(reply.map(|data| data.len()), Ok(472 + 3 * 16));
    let reply = tool.call_vcpu(0, Command::VcpuGetRegisters, &[]);
    assert_eq!(reply.map(|data| data.len()), Ok(472));
}

fn setting_needs_an_event(_: &Ctx) {
    let (vm, mut vcpu) = odd_vm();
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let regs = tool.regs(0);
    assert_eq!(tool.set_regs(0, &regs), Err(KvmiError::OpNotSupp));
    let paused = tool.pause(0);
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    tool.resume(&paused);
    assert!(tool.vcpu_info(0).is_ok());
    vcpu.stop();
    // The command waits until the vCPU runs, and then there is no event.
    let seq = tool.send_to(0, Command::VcpuSetRegisters, regs.as_bytes());
    vcpu.run();
    let reply = tool.reply_to(Command::VcpuSetRegisters.id(), seq);
    assert_eq!(reply, Err(KvmiError::OpNotSupp));
}

fn set_registers_take_effect_after_the_reply(_: &Ctx) {
    let (vm, mut vcpu) = odd_vm();
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let paused = tool.pause(0);
    let old = paused.arch.regs;
    let mut new = old;
    (new.rax, new.r8, new.rsp) = (0xaaaa_5555, u64::MAX, 0x1234_5678_9abc_def0);
    assert_eq!(tool.set_regs(0, &new), Ok(()));
    for _ in 0..3 {
        assert_eq!(tool.regs(0), old, "the event is not over");
    }
    tool.resume(&paused);
    let paused = tool.pause(0);
    assert_eq!(without_rf(paused.arch.regs), without_rf(new));
    // Once is once.
    tool.resume(&paused);
    let paused = tool.pause(0);
    assert_eq!(without_rf(paused.arch.regs), without_rf(new));
    tool.resume(&paused);
    vcpu.stop();
    assert_eq!((vcpu.regs().rax, vcpu.regs().rsp), (new.rax, new.rsp));
}

fn last_set_registers_win(_: &Ctx) {
    let (vm, mut vcpu) = odd_vm();
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let paused = tool.pause(0);
    let mut regs = paused.arch.regs;
    for value in 1..=5 {
        regs.r15 = value;
        // Not a sum of them all, either.
        regs.r14 = if value == 2 { 2 } else { paused.arch.regs.r14 };
        assert_eq!(tool.set_regs(0, &regs), Ok(()));
    }
    tool.resume(&paused);
    let paused = tool.pause(0);
    assert_eq!(without_rf(paused.arch.regs), without_rf(regs));
    tool.resume(&paused);
}

fn set_registers_move_the_guest(_: &Ctx) {
    let (vm, mut vcpu) = odd_vm();
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let paused = tool.pause(0);
    let mut regs = paused.arch.regs;
    regs.rip = OUT_CODE;
    odd_values(&mut regs);
    regs.rbx = 7;
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    vcpu.expect_running();
    tool.resume(&paused);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    let mut there = vcpu.regs();
    // KVM may have moved on already.
    assert!((OUT_CODE..OUT_CODE + 3).contains(&there.rip));
    there.rip = OUT_CODE;
    assert_eq!((there.rflags & !RF, regs.rflags & !RF), (0x202, 0x202));
    there.rflags = regs.rflags;
    assert_eq!(there, regs);
}

fn set_registers_must_be_complete(_: &Ctx) {
    let (vm, mut vcpu) = odd_vm();
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let paused = tool.pause(0);
    let zeros = [0; 144];
    for len in [0, 1, 8, 136, 143] {
        let reply = tool.call_vcpu(0, Command::VcpuSetRegisters, &zeros[..len]);
        assert_eq!(reply, Err(KvmiError::Inval), "{len} bytes");
    }
    let mut regs = paused.arch.regs;
    regs.r15 = 15;
    let mut surplus = regs.as_bytes().to_vec();
    surplus.extend([0xff; 600]);
    assert!(tool
        .call_vcpu(0, Command::VcpuSetRegisters, &surplus)
        .is_ok());
    // A refused command changes nothing.
    let reply = tool.call_vcpu(0, Command::VcpuSetRegisters, &zeros[..143]);
    assert_eq!(reply, Err(KvmiError::Inval));
    tool.resume(&paused);
    let paused = tool.pause(0);
    assert_eq!(without_rf(paused.arch.regs), without_rf(regs));
    tool.resume(&paused);
}

fn set_registers_are_dropped_without_a_reply(_: &Ctx) {
    for disconnect in [true, false] {
        let mut vm = TestVm::new();
        let mut vcpu = vm.control(Guest::Count64);
        vcpu.change_regs(odd_values);
        let old = vcpu.regs();
        let mut tool = vm.hook_allowing_all();
        vcpu.run();
        let paused = tool.pause(0);
        let mut regs = paused.arch.regs;
        (regs.rip, regs.r15) = (OUT_CODE, 15);
        assert_eq!(tool.set_regs(0, &regs), Ok(()));
        let vmm_end = if disconnect {
            tool.disconnect()
        } else {
            vm.unhook();
            None
        };
        vm.expect_progress_of(0);
        vcpu.stop();
        assert_eq!(vcpu.regs().r15, old.r15);
        drop(vmm_end);
    }
}

fn set_registers_survive_a_signal(_: &Ctx) {
    let (vm, mut vcpu) = odd_vm();
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let paused = tool.pause(0);
    let mut regs = paused.arch.regs;
    regs.r15 = 15;
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    vcpu.interrupt();
    assert_eq!(without_rf(vcpu.regs()), without_rf(paused.arch.regs));
    vcpu.run();
    tool.answer(&paused, Action::Continue);
    wait_for("the registers are set", || {
        without_rf(tool.regs(0)) == without_rf(regs)
    });
}

fn set_registers_concern_one_vcpu(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpus = [vm.control(SPIN), vm.control(SPIN)];
    vcpus.iter_mut().for_each(Vcpu::run);
    let mut tool = vm.hook_allowing_all();
    let events = [tool.pause(0), tool.pause(1)];
    let set = [0x1111, 0x2222].map(|value| {
        let index = usize::from(value == 0x2222);
        let mut regs = events[index].arch.regs;
        regs.r15 = value;
        assert_eq!(tool.set_regs(index as u16, &regs), Ok(()));
        regs
    });
    tool.resume(&events[1]);
    tool.resume(&events[0]);
    for vcpu in [0, 1] {
        let paused = tool.pause(vcpu);
        assert_eq!(
            without_rf(paused.arch.regs),
            without_rf(set[usize::from(vcpu)])
        );
        tool.resume(&paused);
    }
}
