// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What guests do while something is measured, in 64-bit mode.

use std::sync::atomic::Ordering;

use anyhow::Result;
use kvm_ioctls::VcpuFd;
use tiny_vm::{
    guest::{self, Mode},
    Guest, Memory, Vm, MEMORY, PAGE, SCRATCH,
};

use crate::act::Act;

/// Where the program is.
pub const CODE: u64 = SCRATCH + 0x1000;
/// A page that a program writes to.
pub const TARGET: u64 = SCRATCH + 0x2000;

/// What a vCPU does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Halts for good; the VM has an interrupt controller.
    Halt,
    /// Counts, with a PAUSE each time: an emulator that runs one CPU at a time takes that for a
    /// hint that it is another one's turn.
    Count,
    /// Executes CPUID so often and writes to a port, again and again.
    CpuidOut(u32),
    /// Writes to so many pages from this address on and then to a port, again and again.
    TouchOut(u32, u64),
    /// Reads so many pages from this address on and then writes to a port, again and again.
    ReadOut(u32, u64),
    /// Writes to [`TARGET`] so often and then to a port, again and again.
    WriteOut(u32),
    /// Writes to [`TARGET`] and counts, with a PAUSE.
    WriteCount,
    /// So often: computes for 2,000 instructions, writes to memory from this address on, four times
    /// per page, and executes CPUID. Then it writes to a port, and does it all again.
    WorkOut(u32, u64),
    /// The same, with a switch to other page tables instead of each CPUID.
    SwitchOut(u32, u64),
    /// Does this and counts, with a PAUSE.
    ActCount(Act),
    /// Does this so often and then writes to a port, again and again.
    ActOut(Act, u32),
}

impl Program {
    fn code(self) -> Result<Vec<u8>> {
        let code: &[u8] = match self {
            // 1: incl (%rbx); hlt; jmp 1b
            Self::Halt => &[0xff, 0x03, 0xf4, 0xeb, 0xfb],
            // 1: incl (%rbx); pause; jmp 1b
            Self::Count => &[0xff, 0x03, 0xf3, 0x90, 0xeb, 0xfa],
            // 1: mov %r8d, %esi; test %esi, %esi; jz 3f
            // 2: xor %eax, %eax; cpuid; dec %esi; jnz 2b
            // 3: out %al, $0x10; jmp 1b
            Self::CpuidOut(_) => &[
                0x44, 0x89, 0xc6, 0x85, 0xf6, 0x74, 0x08, 0x31, 0xc0, 0x0f, 0xa2, 0xff, 0xce, 0x75,
                0xf8, 0xe6, 0x10, 0xeb, 0xed,
            ],
            // 1: mov %r8d, %esi; mov %r9, %rdx; test %esi, %esi; jz 3f
            // 2: mov %al, (%rdx); add %r10, %rdx; dec %esi; jnz 2b
            // 3: out %al, $0x10; jmp 1b
            Self::TouchOut(..) | Self::WriteOut(_) => &[
                0x44, 0x89, 0xc6, 0x4c, 0x89, 0xca, 0x85, 0xf6, 0x74, 0x09, 0x88, 0x02, 0x4c, 0x01,
                0xd2, 0xff, 0xce, 0x75, 0xf7, 0xe6, 0x10, 0xeb, 0xe9,
            ],
            // 1: mov %r8d, %esi; mov %r9, %rdx; shl $6, %esi; jz 3f
            // 2: movaps (%rdx), %xmm0; movaps 16(%rdx), %xmm1; movaps 32(%rdx), %xmm2
            //    movaps 48(%rdx), %xmm3; add $64, %rdx; dec %esi; jnz 2b
            // 3: out %al, $0x10; jmp 1b
            Self::ReadOut(..) => &[
                0x44, 0x89, 0xc6, 0x4c, 0x89, 0xca, 0xc1, 0xe6, 0x06, 0x74, 0x17, 0x0f, 0x28, 0x02,
                0x0f, 0x28, 0x4a, 0x10, 0x0f, 0x28, 0x52, 0x20, 0x0f, 0x28, 0x5a, 0x30, 0x48, 0x83,
                0xc2, 0x40, 0xff, 0xce, 0x75, 0xe9, 0xe6, 0x10, 0xeb, 0xda,
            ],
            // 1: mov %al, (%r9); incl (%rbx); pause; jmp 1b
            Self::WriteCount => &[0x41, 0x88, 0x01, 0xff, 0x03, 0xf3, 0x90, 0xeb, 0xf7],
            // xor %eax, %eax; cpuid
            Self::WorkOut(..) => return Ok(work(&[0x31, 0xc0, 0x0f, 0xa2])),
            Self::SwitchOut(..) => return Ok(work(&Act::Cr3.code()?)),
            Self::ActCount(act) => return Ok(count_each(&act.code()?)),
            Self::ActOut(act, _) => return Ok(repeat(&act.code()?)),
        };
        Ok(code.to_vec())
    }

    /// How often it does what it does, from which address on, in which steps.
    fn parameters(self) -> (u32, u64, u64) {
        match self {
            Self::Halt | Self::Count | Self::ActCount(_) => (0, 0, 0),
            Self::ActOut(_, times) => (times, 0, 0),
            Self::CpuidOut(cpuids) => (cpuids, 0, 0),
            Self::TouchOut(pages, from) => (pages, from, PAGE as u64),
            Self::ReadOut(pages, from) => (pages, from, 0),
            Self::WorkOut(writes, from) | Self::SwitchOut(writes, from) => {
                (writes, from, PAGE as u64 / 4)
            }
            Self::WriteOut(writes) => (writes, TARGET, 0),
            Self::WriteCount => (0, TARGET, 0),
        }
    }

    /// What it does, if that is to be prepared.
    fn act(self) -> Option<Act> {
        match self {
            Self::ActCount(act) | Self::ActOut(act, _) => Some(act),
            Self::SwitchOut(..) => Some(Act::Cr3),
            _ => None,
        }
    }

    /// A VM whose only vCPU is ready to execute this.
    pub fn load(self) -> Result<(Vm, VcpuFd)> {
        let memory = Memory::new(MEMORY);
        let mut vm = Vm::with_memory(memory, 0);
        if self == Self::Halt {
            vm.add_irqchip();
        }
        memory.write(CODE, &self.code()?);
        let (_, vcpu) = vm.prepare_started(Guest::Spin(Mode::Long));
        let mut regs = vcpu.get_regs()?;
        regs.rip = CODE;
        let (often, address, step) = self.parameters();
        (regs.r8, regs.r9, regs.r10) = (often.into(), address, step);
        if let Some(act) = self.act() {
            (regs.r12, regs.r13) = act.prepare(&memory, &vcpu.get_sregs()?);
        }
        vcpu.set_regs(&regs)?;
        Ok((vm, vcpu))
    }
}

/// Does what `end` does after each piece of work:
/// ```text
/// 1: mov %r8d, %esi; mov %r9, %r11
/// 2: mov $500, %ecx
/// 3: imul $0x41c64e6d, %ebp, %ebp; add $12345, %ebp; dec %ecx; jnz 3b
///    mov %ebp, (%r11); add %r10, %r11; (end); dec %esi; jnz 2b
///    out %al, $0x10; jmp 1b
/// ```
fn work(end: &[u8]) -> Vec<u8> {
    let mut code = vec![0x44, 0x89, 0xc6, 0x4d, 0x89, 0xcb];
    let piece = code.len();
    code.extend([
        0xb9, 0xf4, 0x01, 0x00, 0x00, 0x69, 0xed, 0x6d, 0x4e, 0xc6, 0x41, 0x81, 0xc5, 0x39, 0x30,
        0x00, 0x00, 0xff, 0xc9, 0x75, 0xf0, 0x41, 0x89, 0x2b, 0x4d, 0x01, 0xd3,
    ]);
    code.extend(end);
    code.extend([0xff, 0xce]);
    jump_back(&mut code, JNZ, piece);
    code.extend(OUT);
    jump_back(&mut code, JMP, 0);
    code
}

/// `1: (body); incl (%rbx); pause; jmp 1b`
fn count_each(body: &[u8]) -> Vec<u8> {
    let mut code = [body, &[0xff, 0x03, 0xf3, 0x90]].concat();
    jump_back(&mut code, JMP, 0);
    code
}

/// ```text
/// 1: mov %r8d, %r14d; jmp 3f
/// 2: (body)
/// 3: sub $1, %r14d; jnc 2b
///    out %al, $0x10; jmp 1b
/// ```
fn repeat(body: &[u8]) -> Vec<u8> {
    // Lossless: bodies are short.
    let mut code = vec![0x45, 0x89, 0xc6, JMP, body.len() as u8];
    let again = code.len();
    code.extend(body);
    code.extend([0x41, 0x83, 0xee, 0x01]);
    jump_back(&mut code, JNC, again);
    code.extend(OUT);
    jump_back(&mut code, JMP, 0);
    code
}

const JMP: u8 = 0xeb;
const JNC: u8 = 0x73;
const JNZ: u8 = 0x75;
/// `out %al, $0x10`
const OUT: [u8; 2] = [0xe6, 0x10];

/// Adds a jump to an earlier place.
fn jump_back(code: &mut Vec<u8>, jump: u8, to: usize) {
    // Lossless: programs have less than 128 bytes.
    let distance = (code.len() + 2 - to) as u8;
    code.extend([jump, distance.wrapping_neg()]);
}

/// How far the only vCPU has counted.
pub fn count(memory: &Memory) -> u32 {
    memory.number(guest::counter(0)).load(Ordering::Relaxed)
}
