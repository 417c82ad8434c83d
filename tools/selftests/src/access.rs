// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page access: which accesses are reported, and that the guest does what the tool permits and
//! nothing else.

use iced_x86::code_asm::{
    al, byte_ptr, eax, ptr, qword_ptr, r8, rax, rbx, rcx, rdi, rdx, rsi, rsp, xmm0, xmm1, xmm2,
    xmmword_ptr, CodeAssembler,
};
use kvmi_abi::{
    access::{PageAccess, ALL, R, W, X},
    Command, Event, KvmiError,
};

use crate::{
    access_tool::{access_request, emit, expect_accesses, with_code, NEXT, PLAIN, TARGET},
    guest::{HIGH, HIGH_PT},
    harness::{skip, test, Ctx, Test},
    vcpu::Exit,
    vm::{TestVm, MEMORY},
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
    test!(page_table_can_be_protected_from_the_guest),
    test!(pages_can_be_execute_only_where_the_cpu_can),
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
pub fn writers(code: &mut CodeAssembler) {
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

fn page_table_can_be_protected_from_the_guest(_: &Ctx) {
    let unused = HIGH_PT + 8 * 100;
    let (vm, mut vcpu) = with_code(|code| {
        // What the CPU does to the table itself is no access of the guest.
        emit(code.mov(rsi, HIGH));
        emit(code.mov(byte_ptr(rsi), 1));
        emit(code.mov(rax, 0x1234u64));
        emit(code.mov(qword_ptr(unused), rax));
        emit(code.invlpg(byte_ptr(rsi)));
        emit(code.mov(byte_ptr(rsi), 2));
    });
    let mut tool = vm.hook_allowing_all();
    tool.deny(HIGH_PT, W);
    expect_accesses(&mut tool, &mut vcpu, &[(unused, W)]);
    assert_eq!(vm.memory.read(unused, 2), [0x34, 0x12]);
}

fn pages_can_be_execute_only_where_the_cpu_can(_: &Ctx) {
    let (vm, mut vcpu) = with_code(|code| {
        emit(code.mov(rbx, TARGET));
        emit(code.call(rbx));
        emit(code.mov(rax, qword_ptr(TARGET)));
    });
    // ret
    vm.memory.write(TARGET, &[0xc3]);
    let mut tool = vm.hook_allowing_all();
    if tool.set_access(&[PageAccess::new(TARGET, X)]) == Err(KvmiError::Inval) {
        skip("the CPU has no execute-only pages");
    }
    expect_accesses(&mut tool, &mut vcpu, &[(TARGET, R)]);
    assert_eq!(vcpu.regs().rax, 0xc3);
}
