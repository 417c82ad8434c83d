// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page access with several vCPUs on the same page, and much else going on: the number of events is
//! exact, and so is what the guests compute.

use std::collections::VecDeque;

use iced_x86::code_asm::{qword_ptr, rax, rbx, rcx, rdi, xmm0, xmmword_ptr, CodeAssembler};
use kvmi_abi::{
    access::{PageAccess, ALL, R, W, X},
    id::VCPU_EVENT,
    Command,
};

use crate::{
    access_tool::{add_code, emit, CODE, NEXT, TARGET},
    harness::{test, Ctx, Test},
    memory::Memory,
    tool::Tool,
    vcpu::{Exit, Vcpu},
    vcpu_tool::{Ledger, Paused},
    vm::{TestVm, PAGE},
};

const AREA: &str = "access_stress";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(vcpus_that_write_to_one_page_are_all_exact).long(),
    test!(signals_in_the_middle_of_steps_lose_nothing).long(),
    test!(no_write_is_done_before_it_is_permitted).long(),
    test!(changes_under_load_never_hang_the_guest).long(),
    test!(dirty_log_knows_what_was_permitted).long(),
    test!(unhook_in_the_middle_of_steps).long(),
];

const VCPUS: u16 = 4;

/// Where a vCPU writes in [`TARGET`].
fn cell(vcpu: u16) -> u64 {
    TARGET + 512 * u64::from(vcpu)
}

/// Writes in three ways, `rounds` times: [`WRITES`] accesses each time.
fn hammer(code: &mut CodeAssembler, vcpu: u16, rounds: u64) {
    let cell = cell(vcpu);
    emit(code.mov(rcx, rounds));
    let mut again = code.create_label();
    emit(code.set_label(&mut again));
    emit(code.mov(rbx, qword_ptr(cell)));
    emit(code.inc(rbx));
    emit(code.mov(qword_ptr(cell), rbx));
    emit(code.movq(xmm0, rcx));
    emit(code.movdqu(xmmword_ptr(cell + 64), xmm0));
    emit(code.mov(rax, 1u64));
    emit(code.lock().xadd(qword_ptr(cell + 128), rax));
    emit(code.pushfq());
    emit(code.pop(rdi));
    emit(code.or(qword_ptr(NEXT + 8 * u64::from(vcpu)), rdi));
    emit(code.dec(rcx));
    emit(code.jne(again));
}

/// Accesses of a vCPU to the page, each round.
pub const WRITES: u64 = 3;
/// RFLAGS.TF
const TF: u64 = 0x100;

fn hammering(vcpus: u16, rounds: u64) -> (TestVm, Vec<Vcpu>) {
    hammering_in(TestVm::new(), vcpus, rounds)
}

/// Adds vCPUs that are about to write to [`TARGET`].
pub fn hammering_in(mut vm: TestVm, vcpus: u16, rounds: u64) -> (TestVm, Vec<Vcpu>) {
    let vcpus = (0..vcpus)
        .map(|index| {
            let address = CODE + 256 * u64::from(index);
            add_code(&mut vm, address, |code| hammer(code, index, rounds))
        })
        .collect();
    (vm, vcpus)
}

fn number(memory: &Memory, gpa: u64) -> u64 {
    let bytes = memory.read(gpa, 8).try_into();
    u64::from_le_bytes(bytes.expect("eight bytes"))
}

/// Fails the test unless all vCPUs have done what they should, and seen no trace of a step.
#[track_caller]
pub fn expect_exact(vm: &TestVm, vcpus: &mut [Vcpu], rounds: u64) {
    for vcpu in vcpus {
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        let cell = cell(vcpu.index);
        assert_eq!(number(&vm.memory, cell), rounds);
        assert_eq!(number(&vm.memory, cell + 64), 1);
        assert_eq!(number(&vm.memory, cell + 128), rounds);
        let flags = number(&vm.memory, NEXT + 8 * u64::from(vcpu.index));
        assert_eq!(flags & TF, 0, "vCPU {} has seen TF", vcpu.index);
        assert_eq!(vm.record(vcpu.index.into()).count, 0);
    }
}

/// A tool that is asked about each write to [`TARGET`].
pub struct Guard {
    /// The tool.
    pub tool: Tool,
    /// Events that came while the vCPUs were being started.
    early: VecDeque<Paused>,
}

impl Guard {
    /// Protects the page and starts the vCPUs.
    #[track_caller]
    pub fn start(vm: &TestVm, vcpus: &mut [Vcpu]) -> Self {
        let mut tool = vm.hook_allowing_all();
        tool.deny(TARGET, W);
        let mut replies = Ledger::default();
        for vcpu in &*vcpus {
            let seq = tool.send_want_pf(vcpu.index);
            replies.sent(Some(vcpu.index), Command::VcpuControlEvents.id(), seq);
        }
        tool.settle();
        vcpus.iter_mut().for_each(Vcpu::run_through);
        let mut early = VecDeque::new();
        while !replies.is_empty() {
            let message = tool.next();
            if message.header.id == VCPU_EVENT {
                early.push_back(Paused::from(&message));
            } else {
                replies.replied(&message.header);
                assert_eq!(message.reply(), Ok(vec![]));
            }
        }
        Self { tool, early }
    }

    /// Takes the next event.
    #[track_caller]
    fn take(&mut self) -> Paused {
        let early = self.early.pop_front();
        let event = early.unwrap_or_else(|| Paused::from(&self.tool.next()));
        let pf = event.pf.expect("a PF event");
        assert_eq!((pf.access, pf.gpa & !(PAGE as u64 - 1)), (W, TARGET));
        event
    }

    /// Permits this many accesses.
    #[track_caller]
    pub fn permit(&mut self, accesses: u64) {
        for _ in 0..accesses {
            let event = self.take();
            self.tool.resume(&event);
        }
    }
}

fn vcpus_that_write_to_one_page_are_all_exact(ctx: &Ctx) {
    let rounds = ctx.rounds(100) as u64;
    let (vm, mut vcpus) = hammering(VCPUS, rounds);
    let mut guard = Guard::start(&vm, &mut vcpus);
    guard.permit(WRITES * rounds * u64::from(VCPUS));
    expect_exact(&vm, &mut vcpus, rounds);
    guard.tool.settle();
}

fn signals_in_the_middle_of_steps_lose_nothing(ctx: &Ctx) {
    let rounds = ctx.rounds(100) as u64;
    let (vm, mut vcpus) = hammering(2, rounds);
    let mut guard = Guard::start(&vm, &mut vcpus);
    for _ in 0..WRITES * rounds * 2 {
        let event = guard.take();
        guard.tool.resume(&event);
        // Just when they step over an instruction, or are about to.
        vcpus.iter().for_each(Vcpu::signal);
    }
    expect_exact(&vm, &mut vcpus, rounds);
    guard.tool.settle();
}

fn no_write_is_done_before_it_is_permitted(ctx: &Ctx) {
    let rounds = ctx.rounds(50) as u64;
    let (vm, mut vcpus) = hammering(VCPUS, rounds);
    let mut guard = Guard::start(&vm, &mut vcpus);
    let mut page = vec![0; PAGE];
    for _ in 0..WRITES * rounds * u64::from(VCPUS) {
        let event = guard.take();
        // While others step over their instructions, this vCPU waits for the reply.
        let own = usize::from(event.vcpu) * 512;
        let own = own..own + 512;
        assert_eq!(vm.memory.read(TARGET, PAGE)[own.clone()], page[own]);
        perform(&event, &mut page);
        guard.tool.resume(&event);
    }
    expect_exact(&vm, &mut vcpus, rounds);
    assert_eq!(vm.memory.read(TARGET, PAGE), page);
}

/// Does to a copy of the page what the instruction of `event` is about to do.
fn perform(event: &Paused, page: &mut [u8]) {
    let pf = event.pf.expect("a PF event");
    let at = (pf.gpa - TARGET) as usize;
    let slot = &mut page[at..at + 8];
    let regs = &event.arch.regs;
    let value = match at % 512 {
        0 => regs.rbx,
        64 => regs.rcx,
        _ => regs.rax + u64::from_le_bytes((&*slot).try_into().expect("eight bytes")),
    };
    slot.copy_from_slice(&value.to_le_bytes());
}

fn changes_under_load_never_hang_the_guest(ctx: &Ctx) {
    let rounds = ctx.rounds(2000) as u64;
    let (vm, mut vcpus) = hammering(2, rounds);
    let mut tool = vm.hook_allowing_all();
    for vcpu in &mut vcpus {
        vcpu.run_through();
    }
    // Nobody wants events: all is permitted, one way or the other.
    let accesses = [R | X, 0, ALL, R, R | X, ALL];
    for round in 0..ctx.rounds(400) {
        let access = accesses[round % accesses.len()];
        let pages = [
            PageAccess::new(TARGET, access),
            PageAccess::new(CODE, access | R | X),
        ];
        assert_eq!(tool.set_access(&pages), Ok(()));
    }
    let pages = [PageAccess::new(TARGET, ALL), PageAccess::new(CODE, ALL)];
    assert_eq!(tool.set_access(&pages), Ok(()));
    expect_exact(&vm, &mut vcpus, rounds);
}

fn dirty_log_knows_what_was_permitted(_: &Ctx) {
    let mut vm = TestVm::logging();
    let mut vcpu = add_code(&mut vm, CODE, |code| hammer(code, 0, 1));
    let mut guard = Guard::start(&vm, std::slice::from_mut(&mut vcpu));
    let target = TARGET as usize / PAGE;
    vm.dirty_pages();
    for write in 0..WRITES {
        let event = guard.take();
        // What the instruction before has written.
        assert_eq!(vm.dirty_pages().contains(&target), write != 0);
        guard.tool.resume(&event);
    }
    expect_exact(&vm, std::slice::from_mut(&mut vcpu), 1);
    assert!(vm.dirty_pages().contains(&target));
}

fn unhook_in_the_middle_of_steps(ctx: &Ctx) {
    let rounds = ctx.rounds(3000) as u64;
    let (vm, mut vcpus) = hammering(2, rounds);
    for vcpu in &mut vcpus {
        vcpu.run_through();
    }
    for round in 0..ctx.rounds(40) {
        let mut tool = vm.hook_allowing_all();
        tool.deny(TARGET, W);
        if round % 2 == 0 {
            tool.deny(CODE, X);
        }
        tool.settle();
        vm.unhook();
    }
    expect_exact(&vm, &mut vcpus, rounds);
    vm.hook_allowing_all();
    vm.unhook();
}
