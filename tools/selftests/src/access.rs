// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page access: which accesses are reported, and that the guest does what the tool permits and
//! nothing else.

use iced_x86::code_asm::{
    al, byte_ptr, eax, ptr, qword_ptr, r8, rax, rbx, rcx, rdi, rdx, rsi, rsp, xmm0, xmm1, xmm2,
    xmmword_ptr, CodeAssembler,
};
use kvmi_abi::{
    access::{PageAccess, ALL, R, W, X},
    id::VCPU_EVENT,
    Action, Command, Event, KvmiError,
};

use crate::{
    access_tool::{
        access_request, add_code, emit, expect_accesses, with_code, CODE, NEXT, PLAIN, TARGET,
    },
    guest::counter,
    harness::{note, test, Ctx, Test},
    tool::Tool,
    vcpu::Exit,
    vm::{Guest, TestVm, MEMORY, PAGE},
};

const AREA: &str = "access";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(arguments_are_checked),
    test!(every_page_is_tried_and_the_first_error_told),
    test!(write_to_a_protected_page_is_reported_and_done),
    test!(untouched_page_is_protected_from_the_first_access_on),
    test!(reads_of_a_protected_page_are_not_reported),
    test!(each_kind_of_access_is_reported),
    test!(instruction_that_reads_and_writes_is_reported_as_a_write),
    test!(neighbours_are_not_reported),
    test!(access_across_pages_makes_an_event_for_each),
    test!(code_is_stepped_over_instruction_by_instruction),
    test!(every_kind_of_instruction_can_write),
    test!(repeated_instruction_makes_an_event_for_each_iteration),
    test!(flags_never_show_the_step),
    test!(exceptions_of_stepped_code_reach_their_handler),
    test!(event_delivered_to_a_protected_stack_is_reported),
    test!(retry_runs_the_instruction_again),
    test!(crash_ends_kvm_run),
    test!(set_registers_takes_the_guest_elsewhere),
    test!(without_events_accesses_are_permitted),
    test!(granted_again_is_not_reported),
    test!(unhook_lifts_all_restrictions),
    test!(disconnect_lifts_all_restrictions),
    test!(restriction_survives_its_memory_slot),
];

fn arguments_are_checked(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let page = |gpa, access| [PageAccess::new(gpa, access)];
    for access in [R, R | W, R | X, ALL, 0] {
        assert_eq!(tool.set_access(&page(TARGET, access)), Ok(()), "{access}");
    }
    for access in [W, W | X, 8, 0x80, 0xff] {
        let refused = tool.set_access(&page(TARGET, access));
        assert_eq!(refused, Err(KvmiError::Inval), "access {access}");
    }
    for gpa in [MEMORY as u64, 1 << 40, u64::MAX] {
        let refused = tool.set_access(&page(gpa, R));
        assert_eq!(refused, Err(KvmiError::Inval), "gpa {gpa:#x}");
    }
    for at in 9..16 {
        let mut bytes = access_request(&page(TARGET, R));
        bytes[8 + at] = 1;
        let refused = tool.call(Command::VmSetPageAccess, &bytes);
        assert_eq!(refused, Err(KvmiError::Inval), "byte {at}");
    }
    assert_eq!(tool.set_access(&[]), Ok(()));
    assert_eq!(tool.set_access(&page(TARGET, ALL)), Ok(()));
    vm.expect_progress();
}

fn every_page_is_tried_and_the_first_error_told(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(byte_ptr(TARGET), 1));
        emit(code.mov(byte_ptr(NEXT), 1));
    });
    let mut tool = vm.hook_allowing_all();
    let pages = [
        PageAccess::new(TARGET, R | X),
        PageAccess::new(MEMORY as u64, R),
        PageAccess::new(NEXT, R | X),
    ];
    assert_eq!(tool.set_access(&pages), Err(KvmiError::Inval));
    expect_accesses(&mut tool, &mut vcpu, &[(TARGET, W), (NEXT, W)]);
}

fn write_to_a_protected_page_is_reported_and_done(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rax, 0x1122_3344_5566_7788u64));
        emit(code.mov(qword_ptr(TARGET + 8), rax));
        emit(code.mov(qword_ptr(TARGET + 16), rax));
    });
    // Mapped before, then restricted.
    vm.memory.write(TARGET, &[7]);
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    let event = tool.expect_pf(0, TARGET + 8, W);
    assert_eq!(
        vm.memory.read(TARGET + 8, 8),
        [0; 8],
        "written before the reply"
    );
    tool.resume(&event);
    let event = tool.expect_pf(0, TARGET + 16, W);
    assert_eq!(
        vm.memory.read(TARGET + 8, 8),
        0x1122_3344_5566_7788u64.to_le_bytes()
    );
    assert_eq!(vm.memory.read(TARGET + 16, 8), [0; 8]);
    tool.resume(&event);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    assert_eq!(
        vm.memory.read(TARGET + 16, 8),
        0x1122_3344_5566_7788u64.to_le_bytes()
    );
}

fn untouched_page_is_protected_from_the_first_access_on(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| emit(code.mov(byte_ptr(TARGET), 1)));
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    expect_accesses(&mut tool, &mut vcpu, &[(TARGET, W)]);
    assert_eq!(vm.memory.read(TARGET, 1), [1]);
}

fn reads_of_a_protected_page_are_not_reported(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rax, qword_ptr(TARGET)));
        emit(code.mov(byte_ptr(TARGET), 1));
        emit(code.mov(rax, qword_ptr(TARGET)));
        emit(code.mov(rcx, qword_ptr(TARGET + 8)));
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    expect_accesses(&mut tool, &mut vcpu, &[(TARGET, W)]);
}

fn each_kind_of_access_is_reported(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rax, qword_ptr(TARGET)));
        emit(code.mov(qword_ptr(TARGET), rax));
        emit(code.mov(rbx, TARGET + 0x800));
        emit(code.call(rbx));
        emit(code.mov(rax, qword_ptr(TARGET)));
    });
    // ret
    vm.memory.write(TARGET + 0x800, &[0xc3]);
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, ALL);
    let accesses = [(TARGET, R), (TARGET, W), (TARGET + 0x800, X), (TARGET, R)];
    expect_accesses(&mut tool, &mut vcpu, &accesses);
}

fn instruction_that_reads_and_writes_is_reported_as_a_write(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| emit(code.add(qword_ptr(TARGET), 5)));
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, ALL);
    tool.run_wanting_pf(&mut vcpu);
    // An emulated CPU may also notice the read, before.
    let mut event = tool.vcpu_event(0, Event::Pf);
    if event.pf.is_some_and(|pf| pf.access == R) {
        tool.resume(&event);
        event = tool.expect_pf(0, TARGET, W);
    }
    assert_eq!(event.pf.map(|pf| pf.access), Some(W));
    tool.resume(&event);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    assert_eq!(vm.memory.read(TARGET, 1), [5]);
}

fn neighbours_are_not_reported(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(byte_ptr(TARGET - 1), 1));
        emit(code.mov(byte_ptr(NEXT), 1));
        emit(code.mov(byte_ptr(TARGET + 5), 1));
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    expect_accesses(&mut tool, &mut vcpu, &[(TARGET + 5, W)]);
}

fn access_across_pages_makes_an_event_for_each(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rax, 0x0102_0304_0506_0708u64));
        emit(code.mov(qword_ptr(NEXT - 4), rax));
        emit(code.movdqu(xmmword_ptr(NEXT - 8), xmm0));
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.deny(NEXT, W);
    tool.run_wanting_pf(&mut vcpu);
    for first in [NEXT - 4, NEXT - 8] {
        // The CPU is free to check either page first.
        let events = [0, 1].map(|_| {
            let event = tool.vcpu_event(0, Event::Pf);
            let pf = event.pf.expect("what is specific to it");
            assert_eq!(pf.access, W);
            tool.resume(&event);
            pf.gpa
        });
        assert!(events.contains(&first), "{events:x?}");
        assert!(events.contains(&NEXT), "{events:x?}");
    }
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    assert_eq!(vm.memory.read(NEXT - 8, 16), [0; 16]);
}

fn code_is_stepped_over_instruction_by_instruction(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rbx, TARGET));
        emit(code.call(rbx));
    });
    // nop; mov $5, %eax; jmp +0; push %rax; pop %rcx; ret
    let bytes = [0x90, 0xb8, 5, 0, 0, 0, 0xeb, 0, 0x50, 0x59, 0xc3];
    vm.memory.write(TARGET, &bytes);
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, X);
    let fetches = [0, 1, 6, 8, 9, 10].map(|at| (TARGET + at, X));
    expect_accesses(&mut tool, &mut vcpu, &fetches);
    assert_eq!(vcpu.regs().rcx, 5);
}

/// Instructions that write to [`TARGET`], in the order of their addresses.
fn writers(code: &mut CodeAssembler) {
    let at = |nth: u64| TARGET + 64 * nth;
    emit(code.mov(rsi, PLAIN));
    emit(code.mov(rdi, at(0)));
    emit(code.movsq());
    emit(code.mov(rax, 1u64));
    emit(code.xchg(qword_ptr(at(1)), rax));
    emit(code.mov(rax, 1u64));
    emit(code.lock().xadd(qword_ptr(at(2)), rax));
    emit(code.xor(eax, eax));
    emit(code.xor(rdx, rdx));
    emit(code.mov(rbx, 7u64));
    emit(code.xor(rcx, rcx));
    emit(code.lock().cmpxchg16b(xmmword_ptr(at(3))));
    emit(code.movq(xmm1, rbx));
    emit(code.movdqa(xmmword_ptr(at(4)), xmm1));
    emit(code.movnti(qword_ptr(at(5)), rbx));
    emit(code.movups(xmmword_ptr(at(6)), xmm2));
    emit(code.bts(qword_ptr(at(7)), 3));
    emit(code.mov(r8, rsp));
    emit(code.mov(rsp, at(8) + 8));
    emit(code.push(rbx));
    emit(code.mov(rsp, r8));
    emit(code.sete(byte_ptr(at(9))));
    emit(code.stosb());
    emit(code.fxsave(ptr(at(16))));
}

fn every_kind_of_instruction_can_write(_: &Ctx) {
    let (vm, mut vcpu) = with_code(writers);
    vm.memory.write(PLAIN, &[9; 8]);
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    let at = |nth: u64| TARGET + 64 * nth;
    let mut accesses: Vec<_> = (0..=9).map(|nth| (at(nth), W)).collect();
    // stosb comes after movsq.
    accesses.push((at(0) + 8, W));
    accesses.push((at(16), W));
    expect_accesses(&mut tool, &mut vcpu, &accesses);
    let number = |gpa| {
        let bytes = vm.memory.read(gpa, 8).try_into();
        u64::from_le_bytes(bytes.expect("eight bytes"))
    };
    assert_eq!(number(at(0)), 0x0909_0909_0909_0909);
    let values: Vec<_> = (1..=8).map(|nth| number(at(nth))).collect();
    assert_eq!(values, [1, 1, 7, 7, 7, 0, 8, 7]);
}

fn repeated_instruction_makes_an_event_for_each_iteration(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rdi, TARGET));
        emit(code.mov(rcx, 5u64));
        emit(code.mov(al, 0x5a));
        emit(code.rep().stosb());
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    let accesses: Vec<_> = (0..5).map(|nth| (TARGET + nth, W)).collect();
    expect_accesses(&mut tool, &mut vcpu, &accesses);
    assert_eq!(vm.memory.read(TARGET, 6), [0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0]);
}

fn flags_never_show_the_step(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rbx, TARGET));
        emit(code.call(rbx));
    });
    // pushf; pop %rax; push %rax; popf; pushf; pop %rcx; ret
    vm.memory
        .write(TARGET, &[0x9c, 0x58, 0x50, 0x9d, 0x9c, 0x59, 0xc3]);
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, X);
    let fetches = [0, 1, 2, 3, 4, 5, 6].map(|at| (TARGET + at, X));
    expect_accesses(&mut tool, &mut vcpu, &fetches);
    let regs = vcpu.regs();
    assert_eq!((regs.rax, regs.rcx), (0x202, 0x202));
    // Nor did the guest get a debug exception.
    assert_eq!(vm.record(0).count, 0);
}

fn exceptions_of_stepped_code_reach_their_handler(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rbx, TARGET));
        emit(code.call(rbx));
    });
    // int3; ret
    vm.memory.write(TARGET, &[0xcc, 0xc3]);
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, X);
    expect_accesses(&mut tool, &mut vcpu, &[(TARGET, X), (TARGET + 1, X)]);
    let record = vm.record(0);
    assert_eq!(
        (record.vector, record.rip, record.count),
        (3, TARGET + 1, 1)
    );
}

fn event_delivered_to_a_protected_stack_is_reported(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(r8, rsp));
        emit(code.mov(rsp, NEXT));
        emit(code.int3());
        emit(code.mov(rsp, r8));
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    // The CPU pushes five words; then the handler's own pushes.
    let mut events = vec![];
    while vm.record(0).count == 0 {
        let event = tool.vcpu_event(0, Event::Pf);
        let pf = event.pf.expect("what is specific to it");
        assert_eq!((pf.access, pf.gpa & !0xfff), (W, TARGET));
        events.push(pf.gpa);
        tool.resume(&event);
        note!("{:x?}", events);
        if events.len() > 8 {
            break;
        }
        if pf.gpa == NEXT - 8 * 8 {
            break;
        }
    }
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    let record = vm.record(0);
    assert_eq!((record.vector, record.count), (3, 1));
}

fn retry_runs_the_instruction_again(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| emit(code.mov(byte_ptr(TARGET), 1)));
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    for _ in 0..3 {
        let event = tool.expect_pf(0, TARGET, W);
        assert_eq!(event.arch.regs.rip, CODE);
        tool.answer(&event, Action::Retry);
    }
    let event = tool.expect_pf(0, TARGET, W);
    assert_eq!(vm.memory.read(TARGET, 1), [0]);
    tool.deny(TARGET, 0);
    tool.answer(&event, Action::Retry);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    assert_eq!(vm.memory.read(TARGET, 1), [1]);
}

fn crash_ends_kvm_run(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| emit(code.mov(byte_ptr(TARGET), 1)));
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    let event = tool.expect_pf(0, TARGET, W);
    tool.answer(&event, Action::Crash);
    assert_eq!(vcpu.exit(), Exit::Shutdown);
    assert_eq!(vm.memory.read(TARGET, 1), [0]);
}

fn set_registers_takes_the_guest_elsewhere(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(byte_ptr(TARGET), 1));
        emit(code.mov(byte_ptr(TARGET), 2));
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    let first = tool.expect_pf(0, TARGET, W);
    let mut regs = first.arch.regs;
    // mov $imm8, disp32
    regs.rip += 8;
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    // What was permitted was another instruction.
    tool.resume(&first);
    let second = tool.expect_pf(0, TARGET, W);
    assert_eq!(second.arch.regs.rip, regs.rip);
    assert_eq!(vm.memory.read(TARGET, 1), [0]);
    tool.resume(&second);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    assert_eq!(vm.memory.read(TARGET, 1), [2]);
}

fn without_events_accesses_are_permitted(_: &Ctx) {
    let (vm, mut vcpu) = with_code(writers);
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10));
    tool.settle();
    assert_eq!(vm.memory.read(TARGET + 64, 1), [1]);
}

fn granted_again_is_not_reported(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(byte_ptr(TARGET), 1));
        emit(code.mov(byte_ptr(TARGET), 2));
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(TARGET, W);
    tool.run_wanting_pf(&mut vcpu);
    let event = tool.expect_pf(0, TARGET, W);
    tool.deny(TARGET, 0);
    tool.resume(&event);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    tool.settle();
}

/// Protects what two vCPUs count in, while they do; returns when one of them waits for a reply.
#[track_caller]
fn protect_counters(tool: &mut Tool) {
    for vcpu in [0, 1] {
        tool.want_pf(vcpu);
    }
    let page = PageAccess::new(counter(0), R | X);
    tool.send(Command::VmSetPageAccess.id(), &access_request(&[page]));
    // Events may be faster than the reply.
    while tool.next().header.id != VCPU_EVENT {}
}

fn unhook_lifts_all_restrictions(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 2);
    let mut tool = vm.hook_allowing_all();
    protect_counters(&mut tool);
    vm.unhook();
    vm.expect_progress();
    vm.expect_usable();
}

fn disconnect_lifts_all_restrictions(_: &Ctx) {
    let vm = TestVm::running(Guest::Count64, 2);
    let mut tool = vm.hook_allowing_all();
    protect_counters(&mut tool);
    drop(tool);
    vm.expect_progress();
    vm.unhook();
    vm.expect_usable();
}

fn restriction_survives_its_memory_slot(_: &Ctx) {
    const GPA: u64 = 0x1000_0000;
    let memory = crate::memory::Memory::new(4 * PAGE);
    let mut vm = TestVm::new();
    vm.add_slot(1, GPA, &memory);
    let mut vcpu = add_code(&mut vm, CODE, |code| {
        for value in 1..=3 {
            emit(code.mov(byte_ptr(GPA + PAGE as u64), value));
            emit(code.out(0x10, al));
        }
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(GPA + PAGE as u64, W);
    for value in 1..=3 {
        expect_accesses(&mut tool, &mut vcpu, &[(GPA + PAGE as u64, W)]);
        assert_eq!(memory.read(PAGE as u64, 1), [value]);
        vm.remove_slot(1);
        vm.add_slot(1, GPA, &memory);
    }
}
