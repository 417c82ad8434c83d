// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Instructions that the CPU executes one by one, as the tool permits them: the guest cannot tell
//! that from executing them at once.

use iced_x86::code_asm::*;
use kvmi_abi::access::{W, X};

use crate::{
    access_tool::{add_code, emit, CODE, NEXT, PLAIN, TARGET},
    guest::{Record, HIGH},
    harness::{note, test, Ctx, Test},
    registers::{EFER, LSTAR, STAR},
    vcpu::{Exit, Vcpu},
    vm::{TestVm, PAGE, SCRATCH},
};

const AREA: &str = "access_insns";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(stepped_code_does_what_it_does_otherwise),
    test!(stepped_code_of_a_traced_guest_is_traced_by_the_guest),
    test!(syscall_and_sysret_are_stepped_over),
];

/// Where stepped code is.
const STEPPED: u64 = TARGET;
/// A page that it writes to, each time with the tool's permission.
const DATA: u64 = NEXT;
/// A page for its stack, likewise.
const STACK: u64 = TARGET + 2 * PAGE as u64;
const SFMASK: u32 = 0xc000_0084;
const SCE: u64 = 1;

/// What is left of a run.
#[derive(Debug, PartialEq)]
struct Outcome {
    regs: kvmi_abi::arch::Regs,
    data: Vec<u8>,
    stack: Vec<u8>,
    record: Record,
}

type Snippet = (&'static str, fn(&mut CodeAssembler));

/// Runs code that is called from an ordinary page.
#[track_caller]
fn run(snippet: &Snippet, restricted: bool, prepare: impl FnOnce(&mut Vcpu)) -> Outcome {
    let mut vm = TestVm::new();
    let mut vcpu = add_code(&mut vm, CODE, |code| {
        emit(code.mov(r15, rsp));
        emit(code.mov(rsp, STACK + 0x800));
        emit(code.mov(r14, STEPPED));
        emit(code.call(r14));
        emit(code.mov(rsp, r15));
    });
    let mut code = CodeAssembler::new(64).expect("64-bit code");
    snippet.1(&mut code);
    emit(code.ret());
    let bytes = code.assemble(STEPPED).expect("code that can be encoded");
    vm.memory.write(STEPPED, &bytes);
    for page in [DATA, PLAIN] {
        vm.memory.write(page, &[0x11; 256]);
    }
    prepare(&mut vcpu);
    let mut tool = vm.hook_allowing_all();
    if restricted {
        // Nobody wants events, so that all of it is permitted.
        tool.deny(STEPPED, X);
        tool.deny(DATA, W);
        tool.deny(STACK, W);
    }
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10), "{}", snippet.0);
    Outcome {
        regs: vcpu.regs(),
        data: vm.memory.read(DATA, PAGE),
        stack: vm.memory.read(STACK, PAGE),
        record: vm.record(0),
    }
}

/// Where two pages differ, and how.
pub fn differences(one: &[u8], other: &[u8]) -> Vec<(usize, u8, u8)> {
    let pairs = one.iter().zip(other).enumerate();
    pairs
        // But for RF in an image of RFLAGS, about which emulated CPUs are not exact.
        .filter(|(at, (one, other))| one != other && !(at % 8 == 2 && **one ^ **other == 1))
        .map(|(at, (one, other))| (at, *one, *other))
        .collect()
}

#[track_caller]
fn expect_same(snippets: &[Snippet], prepare: fn(&mut Vcpu)) {
    for snippet in snippets {
        note!("{}", snippet.0);
        let free = run(snippet, false, prepare);
        note!("stepped");
        let stepped = run(snippet, true, prepare);
        assert_eq!(free.regs, stepped.regs, "{}", snippet.0);
        assert_eq!(free.record, stepped.record, "{}", snippet.0);
        assert_eq!(differences(&free.data, &stepped.data), [], "{}", snippet.0);
        assert_eq!(
            differences(&free.stack, &stepped.stack),
            [],
            "{}",
            snippet.0
        );
    }
}

/// Whatever is special about stepping over it, and some of all other kinds. INT1 is missing: QEMU's
/// CPU returns from its handler to the INT1 itself.
const SNIPPETS: &[Snippet] = &[
    ("pushf, popf", |code| {
        emit(code.pushfq());
        emit(code.pop(rax));
        emit(code.or(rax, 0x8d5));
        emit(code.push(rax));
        emit(code.popfq());
        emit(code.pushfq());
        emit(code.pop(rdx));
    }),
    ("mov ss", |code| {
        emit(code.mov(ax, ss));
        emit(code.mov(ss, ax));
        emit(code.inc(r8));
        emit(code.inc(r9));
    }),
    ("int3", |code| {
        emit(code.int3());
        emit(code.inc(r8));
    }),
    ("int n", |code| {
        emit(code.int(9));
        emit(code.inc(r8));
    }),
    ("iret", |code| {
        let mut after = code.create_label();
        emit(code.mov(rcx, rsp));
        emit(code.mov(eax, ss));
        emit(code.push(rax));
        emit(code.push(rcx));
        emit(code.push(0x203));
        emit(code.mov(eax, cs));
        emit(code.push(rax));
        emit(code.lea(rax, qword_ptr(after)));
        emit(code.push(rax));
        emit(code.iretq());
        emit(code.set_label(&mut after));
        emit(code.pushfq());
        emit(code.pop(rdx));
    }),
    ("sti, cli", |code| {
        emit(code.cli());
        emit(code.sti());
        emit(code.inc(r8));
        emit(code.pushfq());
        emit(code.pop(rdx));
    }),
    ("cpuid", |code| {
        emit(code.mov(eax, 0));
        emit(code.cpuid());
    }),
    ("msrs", |code| {
        emit(code.mov(ecx, 0xc000_0082u32));
        emit(code.rdmsr());
        emit(code.wrmsr());
    }),
    ("control registers", |code| {
        emit(code.mov(rax, cr3));
        emit(code.mov(cr3, rax));
        emit(code.mov(rax, cr0));
        emit(code.mov(cr0, rax));
    }),
    ("invlpg", |code| {
        emit(code.invlpg(byte_ptr(DATA)));
    }),
    ("debug registers", |code| {
        emit(code.mov(rax, dr7));
        emit(code.mov(dr7, rax));
    }),
    ("descriptor tables", |code| {
        emit(code.sgdt(ptr(DATA)));
        emit(code.lgdt(ptr(DATA)));
        emit(code.sidt(ptr(DATA + 16)));
        emit(code.lidt(ptr(DATA + 16)));
    }),
    ("strings", |code| {
        emit(code.mov(rsi, PLAIN));
        emit(code.mov(r12, rdi));
        emit(code.mov(rdi, DATA + 0x100));
        emit(code.mov(rcx, 9u64));
        emit(code.rep().movsb());
        emit(code.std());
        emit(code.mov(rcx, 3u64));
        emit(code.rep().movsq());
        emit(code.mov(rcx, 0u64));
        emit(code.rep().stosb());
        emit(code.cld());
        emit(code.mov(rsi, PLAIN));
        emit(code.mov(rdi, DATA));
        emit(code.mov(rcx, 300u64));
        emit(code.repe().cmpsb());
        emit(code.mov(rdi, r12));
    }),
    ("locked", |code| {
        emit(code.mov(rax, qword_ptr(DATA)));
        emit(code.mov(rdx, rax));
        emit(code.mov(rbp, 5u64));
        emit(code.lock().cmpxchg(qword_ptr(DATA), rbp));
        emit(code.lock().bts(qword_ptr(DATA + 8), 17));
        emit(code.lock().not(dword_ptr(DATA + 16)));
        emit(code.xchg(byte_ptr(DATA + 20), dl));
        emit(code.lock().cmpxchg8b(qword_ptr(DATA + 24)));
        // All flags, of which QEMU's CPU keeps odd bits otherwise.
        emit(code.cmp(rax, rdx));
    }),
    ("SSE and x87", |code| {
        emit(code.fninit());
        emit(code.fld1());
        emit(code.fldpi());
        emit(code.fmulp(st1, st0));
        emit(code.fstp(qword_ptr(DATA + 8)));
        emit(code.mov(rax, 77u64));
        emit(code.cvtsi2sd(xmm3, rax));
        emit(code.sqrtsd(xmm3, xmm3));
        emit(code.movsd_2(qword_ptr(DATA + 16), xmm3));
        emit(code.maskmovdqu(xmm3, xmm3));
        emit(code.fnstcw(word_ptr(DATA + 40)));
        emit(code.stmxcsr(dword_ptr(DATA + 44)));
    }),
    ("calls and jumps", |code| {
        let mut function = code.create_label();
        let mut over = code.create_label();
        emit(code.call(function));
        emit(code.jmp(over));
        emit(code.set_label(&mut function));
        emit(code.enter(16, 1));
        emit(code.mov(qword_ptr(rbp - 8), rax));
        emit(code.leave());
        emit(code.ret_1(0));
        emit(code.set_label(&mut over));
        emit(code.push(0x1234));
        emit(code.pop(qword_ptr(DATA)));
    }),
];

fn stepped_code_does_what_it_does_otherwise(_: &Ctx) {
    expect_same(SNIPPETS, |_| ());
}

fn stepped_code_of_a_traced_guest_is_traced_by_the_guest(_: &Ctx) {
    // RFLAGS.TF from the start: the handler counts the traps.
    expect_same(
        &[
            ("nops", |code| {
                emit(code.nop());
                emit(code.inc(r8));
                emit(code.mov(byte_ptr(DATA), 1));
            }),
            ("popf of what pushf has pushed", |code| {
                emit(code.pushfq());
                emit(code.popfq());
                emit(code.inc(r8));
            }),
            ("popf that ends it", |code| {
                emit(code.push(0x202));
                emit(code.popfq());
                emit(code.inc(r8));
            }),
        ],
        |vcpu| vcpu.change_regs(|regs| regs.rflags |= 0x100),
    );
}

fn syscall_and_sysret_are_stepped_over(_: &Ctx) {
    const USER: u64 = HIGH + 2 * PAGE as u64;
    const USER_GPA: u64 = SCRATCH + 0x3000;
    for restricted in [false, true] {
        let mut vm = TestVm::new();
        let mut vcpu = add_code(&mut vm, CODE, |code| {
            // Here SYSCALL gets.
            emit(code.mov(rax, r11));
            emit(code.mov(rbx, rcx));
            emit(code.pushfq());
            emit(code.pop(rdx));
        });
        let mut code = CodeAssembler::new(64).expect("64-bit code");
        emit(code.mov(rcx, USER));
        emit(code.mov(r11, 0x246u64));
        emit(code.sysretq());
        vm.memory
            .write(STEPPED, &code.assemble(STEPPED).expect("code"));
        let mut code = CodeAssembler::new(64).expect("64-bit code");
        emit(code.inc(r8));
        emit(code.syscall());
        vm.memory
            .write(USER_GPA, &code.assemble(USER).expect("code"));
        let efer = vcpu.msr(EFER) | SCE;
        let star = 8 << 32 | 8 << 48;
        vcpu.set_msrs(&[(EFER, efer), (STAR, star), (LSTAR, CODE), (SFMASK, 0x300)]);
        vcpu.change_regs(|regs| (regs.rip, regs.r8) = (STEPPED, 0));
        let mut tool = vm.hook_allowing_all();
        if restricted {
            tool.deny(STEPPED, X);
            tool.deny(USER_GPA, X);
        }
        assert_eq!(
            vcpu.run_until_exit(),
            Exit::Out(0x10),
            "restricted {restricted}"
        );
        let regs = vcpu.regs();
        assert_eq!(
            (regs.r8, regs.rbx),
            (1, USER + 5),
            "restricted {restricted}"
        );
        // The user's flags, without a trace of the step; then with IF and TF masked.
        assert_eq!(regs.rax & !0xd5, 0x202, "restricted {restricted}");
        assert_eq!(regs.rdx & 0x300, 0, "restricted {restricted}");
        assert_eq!(vm.record(0).count, 0);
    }
}
