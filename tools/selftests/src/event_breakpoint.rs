// SPDX-License-Identifier: GPL-2.0 OR MIT

//! BREAKPOINT events: the guest is about to execute an INT3, which may be the tool's or its own.

use std::{fs, path::Path};

use iced_x86::code_asm::*;
use kvm_bindings::{kvm_guest_debug, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP};
use kvmi_abi::{Action, Command, Event, KvmiError};
use zerocopy::IntoBytes as _;

use crate::{
    access_tool::emit,
    event_code::{code_in, code_rip, handler, is_tcg, CODE},
    event_common::{control_event, expect_crash, Doing, Wish},
    guest::{Mode, HIGH, SPIN_CODE},
    harness::{note, skip, test, Ctx, Test},
    sys::{self, Errno},
    vcpu::{Exit, Vcpu},
    vm::{Guest, TestVm, SCRATCH},
};

const AREA: &str = "event_breakpoint";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(event_can_be_switched_on_and_off),
    test!(debugger_of_the_vmm_excludes_the_event),
    test!(continued_breakpoint_reaches_the_guest_in_each_mode),
    test!(restored_instruction_is_executed_in_each_mode),
    test!(unchanged_instruction_is_told_again),
    test!(registers_set_elsewhere_skip_the_breakpoint),
    test!(physical_address_is_told),
    test!(prefix_counts),
    test!(other_exceptions_make_no_event),
    test!(breakpoint_inside_of_its_handler_is_told),
    test!(crash_ends_kvm_run),
    test!(next_tool_is_told_nothing),
];

const WISH: Wish = Wish::Event(Event::Breakpoint);
const INT3: u8 = 0xcc;
const NOP: u8 = 0x90;

/// Skips the test where the CPU does not tell KVM of an INT3.
pub fn need_interception() {
    // There if the kernel was built with KVM_INTROSPECTION_TEST, which makes up for it.
    let testing = Path::new("/sys/module/kvm/parameters/introspection_lose_traps");
    if is_tcg() && !testing.exists() {
        skip("QEMU's CPU takes an INT3 for a software interrupt");
    }
}

/// A VM with one vCPU that is about to execute an INT3, and what is told of that.
fn about_to_break(mode: Mode) -> (TestVm, Vcpu, Doing) {
    let (vm, vcpu) = code_in(mode, |code| emit(code.int3()));
    (vm, vcpu, int3(CODE))
}

fn int3(gpa: u64) -> Doing {
    Doing::Breakpoint { gpa, insn_len: 1 }
}

fn event_can_be_switched_on_and_off(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let id = Event::Breakpoint.id();
    for enable in [0, 1, 1, 0, 0, 1] {
        assert_eq!(tool.control_vcpu_event(0, id, enable), Ok(()));
    }
    sys::event(&vm, 0, id.into()).expect("an event can be disallowed");
    assert_eq!(tool.control_vcpu_event(0, id, 1), Err(KvmiError::Perm));
    vm.expect_progress();
}

/// `KVM_SET_GUEST_DEBUG`
#[track_caller]
fn debug(vcpu: &mut Vcpu, control: u32) -> Result<(), Errno> {
    let set = vcpu.with(move |fd| {
        fd.set_guest_debug(&kvm_guest_debug {
            control,
            ..Default::default()
        })
    });
    set.map_err(|error| Errno::from_raw_os_error(error.errno()))
}

fn debugger_of_the_vmm_excludes_the_event(_: &Ctx) {
    const BREAKPOINTS: u32 = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    let mut tool = vm.hook_allowing_all();
    let mut control = |vcpu: &mut Vcpu, enable: bool| {
        vcpu.run();
        let id = Event::Breakpoint.id();
        let reply = tool.control_vcpu_event(0, id, enable.into());
        vcpu.stop();
        reply
    };
    for _ in 0..3 {
        assert_eq!(debug(&mut vcpu, BREAKPOINTS), Ok(()));
        assert_eq!(control(&mut vcpu, true), Err(KvmiError::Busy));
        assert_eq!(control(&mut vcpu, false), Ok(()));
        assert_eq!(debug(&mut vcpu, KVM_GUESTDBG_ENABLE), Ok(()));
        assert_eq!(control(&mut vcpu, true), Ok(()));
        assert_eq!(control(&mut vcpu, true), Ok(()));
        assert_eq!(debug(&mut vcpu, BREAKPOINTS), Err(Errno::BUSY));
        // What does not concern breakpoints is the VMM's own business.
        assert_eq!(debug(&mut vcpu, KVM_GUESTDBG_ENABLE), Ok(()));
        assert_eq!(debug(&mut vcpu, 0), Ok(()));
        assert_eq!(control(&mut vcpu, false), Ok(()));
    }
    assert_eq!(control(&mut vcpu, true), Ok(()));
    vm.unhook();
    // At once, or when the vCPU has noticed.
    vcpu.run();
    vcpu.stop();
    assert_eq!(debug(&mut vcpu, BREAKPOINTS), Ok(()));
}

fn continued_breakpoint_reaches_the_guest_in_each_mode(_: &Ctx) {
    need_interception();
    for (mode, _) in Mode::ALL {
        note!("{mode:?}");
        let (vm, mut vcpu, doing) = about_to_break(mode);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[WISH]);
        let event = tool.expect(0, doing);
        assert_eq!(event.arch.regs.rip, code_rip(mode));
        assert_eq!(vm.record(0).count, 0);
        tool.resume(&event);
        tool.expect_end(&mut vcpu);
        let record = vm.record(0);
        assert_eq!((record.vector, record.count), (3, 1));
        assert_eq!(record.rip, code_rip(mode) + 1);
    }
}

fn restored_instruction_is_executed_in_each_mode(_: &Ctx) {
    need_interception();
    for (mode, _) in Mode::ALL {
        note!("{mode:?}");
        let (vm, mut vcpu) = code_in(mode, |code| {
            emit(code.nop());
            emit(code.inc(si));
        });
        let before = vcpu.regs().rsi;
        vm.memory.write(CODE, &[INT3]);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[WISH]);
        let event = tool.expect(0, int3(CODE));
        assert_eq!(tool.write(CODE, &[NOP]), Ok(()));
        tool.answer(&event, Action::Retry);
        tool.expect_end(&mut vcpu);
        assert_eq!(vcpu.regs().rsi, before + 1);
        assert_eq!(vm.record(0).count, 0);
    }
}

fn unchanged_instruction_is_told_again(_: &Ctx) {
    need_interception();
    let (vm, mut vcpu, doing) = about_to_break(Mode::Long);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    for seq in 1..=5 {
        let event = tool.expect(0, doing);
        assert_eq!(event.seq, seq);
        tool.answer(&event, Action::Retry);
    }
    tool.let_pass(0, &[doing]);
    tool.expect_end(&mut vcpu);
    assert_eq!(vm.record(0).count, 1);
}

fn registers_set_elsewhere_skip_the_breakpoint(_: &Ctx) {
    need_interception();
    for action in [Action::Continue, Action::Retry] {
        let (vm, mut vcpu, doing) = about_to_break(Mode::Long);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[WISH]);
        let event = tool.expect(0, doing);
        let mut regs = event.arch.regs;
        regs.rip += 1;
        assert_eq!(tool.set_regs(0, &regs), Ok(()));
        tool.answer(&event, action);
        tool.expect_end(&mut vcpu);
        assert_eq!(vm.record(0).count, 0);
    }
}

fn physical_address_is_told(_: &Ctx) {
    need_interception();
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    // int3; out %al, $0x10
    vm.memory.write(SCRATCH + 5, &[INT3, 0xe6, 0x10]);
    vcpu.change_regs(|regs| regs.rip = HIGH + 5);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    let event = tool.expect(0, int3(SCRATCH + 5));
    assert_eq!(event.arch.regs.rip, HIGH + 5);
    tool.resume(&event);
    tool.expect_end(&mut vcpu);
    assert_eq!(vm.record(0).rip, HIGH + 6);
}

fn prefix_counts(_: &Ctx) {
    need_interception();
    let told = fs::read_to_string("/sys/module/kvm_amd/parameters/nrips");
    if !is_tcg() && told.is_ok_and(|told| told.trim() == "0") {
        skip("the CPU does not tell how long instructions are");
    }
    // REP and CS, which change nothing.
    let (vm, mut vcpu) = code_in(Mode::Long, |code| emit(code.db(&[0xf3, 0x2e, INT3])));
    let mut tool = vm.hook_allowing_all();
    let doing = Doing::Breakpoint {
        gpa: CODE,
        insn_len: 3,
    };
    tool.expect_events(&mut vcpu, &[WISH], &[doing]);
    let record = vm.record(0);
    assert_eq!((record.vector, record.rip), (3, CODE + 3));
}

fn other_exceptions_make_no_event(_: &Ctx) {
    let (vm, mut vcpu) = code_in(Mode::Long, |code| {
        // INT 3 of two bytes is a software interrupt, not a breakpoint.
        emit(code.int(3));
        emit(code.int(9));
    });
    let mut tool = vm.hook_allowing_all();
    tool.expect_events(&mut vcpu, &[WISH], &[]);
    let record = vm.record(0);
    assert_eq!((record.vector, record.count), (9, 2));
}

fn breakpoint_inside_of_its_handler_is_told(_: &Ctx) {
    need_interception();
    let (vm, mut vcpu, doing) = about_to_break(Mode::Long);
    // An INT3 of the tool where the handler begins.
    let handler = handler(&vm, &mut vcpu, Mode::Long, 3);
    let first = vm.memory.read(handler, 1);
    vm.memory.write(handler, &[INT3]);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    tool.let_pass(0, &[doing]);
    let inner = tool.expect(0, int3(handler));
    assert_eq!(tool.write(handler, &first), Ok(()));
    tool.answer(&inner, Action::Retry);
    tool.expect_end(&mut vcpu);
    let record = vm.record(0);
    assert_eq!((record.count, record.rip), (1, CODE + 1));
}

fn crash_ends_kvm_run(_: &Ctx) {
    need_interception();
    let (vm, mut vcpu, doing) = about_to_break(Mode::Long);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[WISH]);
    let event = tool.expect(0, doing);
    expect_crash(&mut tool, &mut vcpu, &event);
    assert_eq!(vm.record(0).count, 0);
}

fn next_tool_is_told_nothing(_: &Ctx) {
    need_interception();
    for unhook in [true, false] {
        let (vm, mut vcpu, doing) = about_to_break(Mode::Long);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[WISH]);
        tool.expect(0, doing);
        // In the middle of the event: the INT3 is the guest's own then.
        if unhook {
            vm.unhook();
        } else {
            drop(tool.disconnect());
        }
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        assert_eq!(vm.record(0).count, 1);
        if !unhook {
            vm.unhook();
        }
        let mut next = vm.hook_allowing_all();
        vcpu.change_regs(|regs| regs.rip = CODE);
        vcpu.run();
        next.expect_end(&mut vcpu);
        assert_eq!(vm.record(0).count, 2);
        // Nor is it in the way of the VMM's debugger.
        vcpu.change_regs(|regs| regs.rip = SPIN_CODE);
        let debugging = debug(&mut vcpu, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP);
        assert_eq!(debugging, Ok(()));
        let request = control_event(Event::Breakpoint, true);
        let seq = next.send_to(0, Command::VcpuControlEvents, request.as_bytes());
        next.settle();
        vcpu.run();
        let reply = next.reply_to(Command::VcpuControlEvents.id(), seq);
        assert_eq!(reply, Err(KvmiError::Busy));
    }
}
