// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page access by instructions that KVM emulates: those for devices, and whatever has the prefix
//! that forces emulation.

use std::{fs, sync::atomic::Ordering};

use iced_x86::code_asm::*;
use kvmi_abi::{
    access::{PageAccess, ALL, R, W, X},
    id::VCPU_EVENT,
    Action, Command,
};

use crate::{
    access_tool::{access_request, emit, with_code, NEXT, PLAIN, TARGET},
    harness::{note, skip, test, Ctx, Test},
    tool::Tool,
    util::wait_for,
    vcpu::{Exit, Vcpu, DEVICE},
    vcpu_tool::Paused,
    vm::TestVm,
};

const AREA: &str = "access_emulated";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(device_is_read_when_its_data_may_be_written),
    test!(data_for_a_device_is_read_when_permitted),
    test!(string_input_is_not_lost_to_a_protected_page),
    test!(string_output_from_a_protected_page_is_reported),
    test!(device_is_accessed_once_by_stepped_code),
    test!(each_kind_of_emulated_access_is_reported),
    test!(code_on_a_page_that_may_not_be_executed_is_not_emulated),
    test!(permitted_accesses_are_emulated),
    test!(emulated_writes_stop_when_the_page_is_denied),
];

/// Guest physical addresses without memory, which the guest has mapped.
const MMIO: u64 = 0x2000_0000;

/// Checks that the vCPU goes on to the end of its code, and no event has come meanwhile.
#[track_caller]
fn expect_end(tool: &mut Tool, vcpu: &mut Vcpu) {
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    tool.settle();
}

fn device_is_read_when_its_data_may_be_written(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rsi, MMIO));
        emit(code.mov(rdi, TARGET + 8));
        emit(code.movsq());
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    for action in [Action::Retry, Action::Continue] {
        let event = tool.expect_pf(0, TARGET + 8, W);
        assert_eq!(event.pf.map(|pf| pf.gva), Some(TARGET + 8));
        tool.answer(&event, action);
    }
    // Once only: reading may have an effect on a device.
    assert_eq!(vcpu.exit(), Exit::MmioRead(MMIO));
    assert_eq!(vm.memory.read(TARGET + 8, 8), [0; 8]);
    vcpu.run();
    expect_end(&mut tool, &mut vcpu);
    assert_eq!(vm.memory.read(TARGET + 8, 8), [DEVICE; 8]);
}

fn data_for_a_device_is_read_when_permitted(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rsi, TARGET));
        emit(code.mov(rdi, MMIO + 4));
        emit(code.movsb());
    });
    vm.memory.write(TARGET, &[7]);
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, ALL);
    tool.run_wanting_pf(&mut vcpu);
    tool.allow_pfs(0, &[(TARGET, R)]);
    assert_eq!(vcpu.exit(), Exit::MmioWrite(MMIO + 4, 7));
    vcpu.run();
    expect_end(&mut tool, &mut vcpu);
}

fn string_input_is_not_lost_to_a_protected_page(_: &Ctx) {
    // Upwards KVM reads ahead as much as fits in the page, downwards it does not.
    for (down, reads, bytes_each) in [(false, 1, 3), (true, 3, 1)] {
        let (vm, mut vcpu) = with_code(|code| {
            emit(code.mov(rdi, TARGET + 2));
            emit(code.mov(edx, 0x30));
            emit(code.mov(rcx, 3u64));
            if down {
                emit(code.std());
            }
            emit(code.rep().insb());
            emit(code.cld());
        });
        let mut tool = vm.hook_allowing_all();
        tool.deny(TARGET, W);
        tool.run_wanting_pf(&mut vcpu);
        for nth in 0..reads {
            let at = if down { 2 - nth } else { 2 };
            tool.allow_pfs(0, &[(TARGET + at, W)]);
            assert_eq!(vcpu.exit(), Exit::In(0x30, bytes_each), "down: {down}");
            vcpu.run();
        }
        expect_end(&mut tool, &mut vcpu);
        let first = if down { 0 } else { 2 };
        assert_eq!(vm.memory.read(TARGET + first, 3), [DEVICE; 3]);
        assert_eq!(vcpu.regs().rcx, 0);
    }
}

fn string_output_from_a_protected_page_is_reported(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rsi, TARGET));
        emit(code.mov(edx, 0x30));
        emit(code.outsb());
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, ALL);
    tool.run_wanting_pf(&mut vcpu);
    tool.allow_pfs(0, &[(TARGET, R)]);
    assert_eq!(vcpu.exit(), Exit::Out(0x30));
    vcpu.run();
    expect_end(&mut tool, &mut vcpu);
}

fn device_is_accessed_once_by_stepped_code(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rax, TARGET));
        emit(code.call(rax));
    });
    let mut code = CodeAssembler::new(64).expect("64-bit code");
    emit(code.mov(eax, dword_ptr(MMIO)));
    emit(code.mov(dword_ptr(MMIO + 8), eax));
    emit(code.in_(al, 0x31));
    emit(code.ret());
    let bytes = code.assemble(TARGET).expect("code that can be encoded");
    vm.memory.write(TARGET, &bytes);
    let mut tool = vm.hook_allowing_all();
    // Nobody wants events: each instruction is permitted.
    tool.deny(TARGET, X);
    assert_eq!(vcpu.run_until_exit(), Exit::MmioRead(MMIO));
    assert_eq!(vcpu.run_until_exit(), Exit::MmioWrite(MMIO + 8, DEVICE));
    assert_eq!(vcpu.run_until_exit(), Exit::In(0x31, 1));
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10));
    assert_eq!(vcpu.regs().rax & 0xff, u64::from(DEVICE));
}

/// The file that switches the prefix on, which is off again when this is dropped.
struct ForcedEmulation(String);

impl ForcedEmulation {
    const FILE: &'static str = "/sys/module/kvm/parameters/force_emulation_prefix";

    fn on() -> Self {
        let Ok(before) = fs::read_to_string(Self::FILE) else {
            skip("this KVM cannot be made to emulate an instruction");
        };
        fs::write(Self::FILE, "1").expect("the prefix can be switched on");
        Self(before)
    }
}

impl Drop for ForcedEmulation {
    fn drop(&mut self) {
        // Best effort: the test is over.
        let _ = fs::write(Self::FILE, &self.0);
    }
}

/// Has KVM emulate the next instruction (`KVM_FEP` of its own tests).
fn emulated(code: &mut CodeAssembler) {
    emit(code.db(&[0x0f, 0x0b, b'k', b'v', b'm']));
}

type Case = (&'static str, fn(&mut CodeAssembler), &'static [(u64, u8)]);

/// Instructions that access [`TARGET`], or [`NEXT`], or both, and what is reported.
const CASES: &[Case] = &[
    (
        "load",
        |code| emit(code.mov(rax, qword_ptr(TARGET))),
        &[(TARGET, R)],
    ),
    (
        "store",
        |code| emit(code.mov(qword_ptr(TARGET), rax)),
        &[(TARGET, W)],
    ),
    (
        "read and write",
        |code| emit(code.add(qword_ptr(TARGET), 1)),
        &[(TARGET, W)],
    ),
    (
        "locked",
        |code| {
            emit(code.lock().inc(dword_ptr(TARGET)));
        },
        &[(TARGET, W)],
    ),
    (
        "cmpxchg8b",
        |code| emit(code.lock().cmpxchg8b(qword_ptr(TARGET))),
        &[(TARGET, W)],
    ),
    (
        "across pages",
        |code| emit(code.mov(qword_ptr(NEXT - 4), rax)),
        &[(NEXT - 4, W), (NEXT, W)],
    ),
    (
        "string",
        |code| emit(code.movsq()),
        &[(NEXT, W), (TARGET, R)],
    ),
    ("push", |code| emit(code.push(rax)), &[(TARGET + 0x7f8, W)]),
    ("pop", |code| emit(code.pop(rax)), &[(TARGET + 0x800, R)]),
    (
        "descriptor table",
        |code| emit(code.sgdt(ptr(TARGET))),
        &[(TARGET, W)],
    ),
    (
        "XMM",
        |code| emit(code.movdqa(xmmword_ptr(TARGET), xmm0)),
        &[(TARGET, W)],
    ),
];

/// A vCPU that has one instruction of [`CASES`] emulated.
fn emulating(case: &Case) -> (TestVm, Vcpu) {
    with_code(|code| {
        emit(code.mov(r15, rsp));
        emit(code.mov(rsp, TARGET + 0x800));
        emit(code.mov(rsi, TARGET));
        emit(code.mov(rdi, NEXT));
        emulated(code);
        case.1(code);
        emit(code.mov(rsp, r15));
    })
}

fn each_kind_of_emulated_access_is_reported(_: &Ctx) {
    let _forced = ForcedEmulation::on();
    for case in CASES {
        note!("{}", case.0);
        let (free_vm, mut free) = emulating(case);
        assert_eq!(free.run_until_exit(), Exit::Out(0x10), "{}", case.0);
        let (vm, mut vcpu) = emulating(case);
        let mut tool = vm.hook_allowing_all();
        tool.deny(TARGET, ALL);
        tool.deny(NEXT, ALL);
        tool.run_wanting_pf(&mut vcpu);
        for (gpa, access) in case.2 {
            let event = tool.expect_pf(0, *gpa, *access);
            assert_eq!(vm.memory.read(*gpa, 16), [0; 16], "{} was done", case.0);
            tool.resume(&event);
        }
        expect_end(&mut tool, &mut vcpu);
        assert_eq!(vcpu.regs(), free.regs(), "{}", case.0);
        assert!(
            vm.memory.read(TARGET, 8192) == free_vm.memory.read(TARGET, 8192),
            "{} has another result",
            case.0
        );
    }
}

fn code_on_a_page_that_may_not_be_executed_is_not_emulated(_: &Ctx) {
    let _forced = ForcedEmulation::on();
    // Two bytes of it are on the page before.
    const INSN: u64 = NEXT - 2;
    const LENGTH: u64 = 7;
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rax, INSN - 5));
        emit(code.call(rax));
    });
    let mut code = CodeAssembler::new(64).expect("64-bit code");
    emulated(&mut code);
    emit(code.inc(dword_ptr(PLAIN)));
    emit(code.ret());
    let bytes = code.assemble(INSN - 5).expect("code that can be encoded");
    vm.memory.write(INSN - 5, &bytes);
    let mut tool = vm.hook_allowing_all();
    tool.deny(NEXT, X);
    tool.run_wanting_pf(&mut vcpu);
    let event = tool.expect_pf(0, NEXT, X);
    assert_eq!(event.arch.regs.rip, INSN);
    assert_eq!(vm.memory.read(PLAIN, 1), [0]);
    tool.resume(&event);
    tool.allow_pfs(0, &[(INSN + LENGTH, X)]);
    expect_end(&mut tool, &mut vcpu);
    assert_eq!(vm.memory.read(PLAIN, 1), [1]);
}

fn permitted_accesses_are_emulated(_: &Ctx) {
    // The CPU cannot step over this one everywhere: it is emulated with permits.
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(r15, rsp));
        emit(code.mov(rsp, TARGET + 0x800));
        emit(code.pushfq());
        emit(code.mov(rax, ss));
        emit(code.mov(word_ptr(NEXT), ss));
        emit(code.mov(ss, word_ptr(NEXT)));
        emit(code.mov(rsp, r15));
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, ALL);
    tool.deny(NEXT, ALL);
    tool.run_wanting_pf(&mut vcpu);
    tool.allow_pfs(0, &[(TARGET + 0x7f8, W), (NEXT, W), (NEXT, R)]);
    expect_end(&mut tool, &mut vcpu);
    assert_eq!(vm.memory.read(TARGET + 0x7f9, 1)[0] & 1, 0, "TF was seen");
}

fn emulated_writes_stop_when_the_page_is_denied(ctx: &Ctx) {
    let _forced = ForcedEmulation::on();
    let (vm, mut vcpu) = with_code(|code| {
        let mut again = code.create_label();
        emit(code.set_label(&mut again));
        emulated(code);
        emit(code.inc(dword_ptr(PLAIN)));
        emit(code.jmp(again));
    });
    let mut tool = vm.hook_allowing_all();
    tool.run_wanting_pf(&mut vcpu);
    let count = || vm.memory.number(PLAIN).load(Ordering::SeqCst);
    let deny = access_request(&[PageAccess::new(PLAIN, R | X)]);
    for _ in 0..ctx.rounds(100) {
        let before = count();
        wait_for("the guest writes", || count() != before);
        let seq = tool.send(Command::VmSetPageAccess.id(), &deny);
        // The event may be faster than the reply.
        let (mut denied, mut event) = (None, None);
        while denied.is_none() || event.is_none() {
            let message = tool.next();
            if message.header.id == VCPU_EVENT {
                event = Some(Paused::from(&message));
            } else {
                assert_eq!(message.header.seq, seq);
                denied = Some(count());
            }
        }
        assert_eq!(Some(count()), denied, "written after the reply");
        tool.deny(PLAIN, 0);
        tool.resume(&event.expect("it was waited for"));
    }
    vcpu.stop();
}
