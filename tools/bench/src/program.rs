// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What guests do while something is measured, in 64-bit mode.

use std::sync::atomic::Ordering;

use anyhow::Result;
use kvm_ioctls::VcpuFd;
use tiny_vm::{
    guest::{self, Mode},
    Guest, Memory, Vm, MEMORY, SCRATCH,
};

/// Where the program is.
const CODE: u64 = SCRATCH + 0x1000;

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
}

impl Program {
    fn code(self) -> &'static [u8] {
        match self {
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
        }
    }

    /// A VM whose only vCPU is ready to execute this.
    pub fn load(self) -> Result<(Vm, VcpuFd)> {
        let memory = Memory::new(MEMORY);
        let mut vm = Vm::with_memory(memory, 0);
        if self == Self::Halt {
            vm.add_irqchip();
        }
        memory.write(CODE, self.code());
        let (_, vcpu) = vm.prepare_started(Guest::Spin(Mode::Long));
        let mut regs = vcpu.get_regs()?;
        regs.rip = CODE;
        if let Self::CpuidOut(cpuids) = self {
            regs.r8 = cpuids.into();
        }
        vcpu.set_regs(&regs)?;
        Ok((vm, vcpu))
    }
}

/// How far the only vCPU has counted.
pub fn count(memory: &Memory) -> u32 {
    memory.number(guest::counter(0)).load(Ordering::Relaxed)
}
