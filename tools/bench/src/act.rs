// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What guests do by themselves that a tool can be asked about, in 64-bit mode.

use std::fs;

use anyhow::Result;
use kvm_bindings::kvm_sregs;
use kvmi_client::{abi::guest_event::Cr, EventId};
use tiny_vm::{Memory, PAGE, SCRATCH};

use crate::{program::TARGET, scene::Client};

/// Page tables that map what those of all guests do.
const OTHER_TABLES: u64 = SCRATCH + 0x8000;

/// The instruction in question, with what it needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Writes CR0, which KVM intercepts anyway.
    Cr0,
    /// Switches between two page tables.
    Cr3,
    /// Writes to CR3 what it has.
    SameCr3,
    /// Writes CR4, which KVM intercepts anyway.
    Cr4,
    /// Writes an MSR that KVM intercepts anyway.
    Efer,
    /// Writes an MSR that guests can write without an exit.
    Lstar,
    /// Hits a breakpoint, and has its handler return.
    Int3,
    /// Calls the tool.
    Hypercall,
    /// Stores the address of the segment descriptors.
    Sgdt,
    /// Loads that address.
    Lgdt,
    /// Executes any instruction.
    Nop,
}

impl Act {
    /// Its code. The register gets what is in R12, which differs from the last time by R13.
    pub fn code(self) -> Result<Vec<u8>> {
        let code: &[u8] = match self {
            // xor %r13, %r12; mov %r12, %cr0
            Self::Cr0 => &[0x4d, 0x31, 0xec, 0x41, 0x0f, 0x22, 0xc4],
            // xor %r13, %r12; mov %r12, %cr3
            Self::Cr3 | Self::SameCr3 => &[0x4d, 0x31, 0xec, 0x41, 0x0f, 0x22, 0xdc],
            // xor %r13, %r12; mov %r12, %cr4
            Self::Cr4 => &[0x4d, 0x31, 0xec, 0x41, 0x0f, 0x22, 0xe4],
            // xor %r13, %r12; mov $EFER, %ecx; mov %r12d, %eax; xor %edx, %edx; wrmsr
            Self::Efer => &[
                0x4d, 0x31, 0xec, 0xb9, 0x80, 0x00, 0x00, 0xc0, 0x44, 0x89, 0xe0, 0x31, 0xd2, 0x0f,
                0x30,
            ],
            // xor %r13, %r12; mov $LSTAR, %ecx; mov %r12d, %eax; xor %edx, %edx; wrmsr
            Self::Lstar => &[
                0x4d, 0x31, 0xec, 0xb9, 0x82, 0x00, 0x00, 0xc0, 0x44, 0x89, 0xe0, 0x31, 0xd2, 0x0f,
                0x30,
            ],
            // int3
            Self::Int3 => &[0xcc],
            // mov $34, %eax; mov $24, %edi; xor %esi, %esi
            Self::Hypercall => {
                let arguments = [0xb8, 34, 0, 0, 0, 0xbf, 24, 0, 0, 0, 0x31, 0xf6];
                return Ok([&arguments[..], &hypercall()?].concat());
            }
            // sgdt (%r12)
            Self::Sgdt => &[0x41, 0x0f, 0x01, 0x04, 0x24],
            // lgdt (%r12)
            Self::Lgdt => &[0x41, 0x0f, 0x01, 0x14, 0x24],
            // nop
            Self::Nop => &[0x90],
        };
        Ok(code.to_vec())
    }

    /// Makes a guest ready for it, and returns what R12 and R13 have to be.
    pub fn prepare(self, memory: &Memory, sregs: &kvm_sregs) -> (u64, u64) {
        const AM: u64 = 1 << 18;
        const TSD: u64 = 1 << 2;
        const SCE: u64 = 1;

        match self {
            Self::Cr0 => (sregs.cr0, AM),
            Self::Cr3 => {
                memory.write(OTHER_TABLES, &memory.read(sregs.cr3, PAGE));
                (sregs.cr3, sregs.cr3 ^ OTHER_TABLES)
            }
            Self::SameCr3 => (sregs.cr3, 0),
            Self::Cr4 => (sregs.cr4, TSD),
            Self::Efer => (sregs.efer, SCE),
            Self::Lstar => (0, SCRATCH),
            Self::Sgdt | Self::Lgdt => {
                memory.write(TARGET, &sregs.gdt.limit.to_le_bytes());
                memory.write(TARGET + 2, &sregs.gdt.base.to_le_bytes());
                (TARGET, 0)
            }
            Self::Int3 | Self::Hypercall | Self::Nop => (0, 0),
        }
    }

    /// The event that it makes.
    pub fn event(self) -> EventId {
        match self {
            Self::Cr0 | Self::Cr3 | Self::SameCr3 | Self::Cr4 => EventId::Cr,
            Self::Efer | Self::Lstar => EventId::Msr,
            Self::Int3 => EventId::Breakpoint,
            Self::Hypercall => EventId::Hypercall,
            Self::Sgdt | Self::Lgdt => EventId::Descriptor,
            Self::Nop => EventId::Singlestep,
        }
    }

    /// Has vCPU 0 ask the tool when it does that.
    pub fn track(self, client: &mut Client<'_>) -> Result<()> {
        const EFER: u32 = 0xc000_0080;
        const LSTAR: u32 = 0xc000_0082;

        client.vcpu_control_events(0, self.event(), true)?;
        match self {
            Self::Cr0 => client.control_cr(0, Cr::Cr0, true)?,
            Self::Cr3 | Self::SameCr3 => client.control_cr(0, Cr::Cr3, true)?,
            Self::Cr4 => client.control_cr(0, Cr::Cr4, true)?,
            Self::Efer => client.control_msr(0, EFER, true)?,
            Self::Lstar => client.control_msr(0, LSTAR, true)?,
            Self::Nop => client.control_singlestep(0, true)?,
            Self::Int3 | Self::Hypercall | Self::Sgdt | Self::Lgdt => {}
        }
        Ok(())
    }
}

/// The hypercall instruction of this CPU: VMMCALL or VMCALL.
pub fn hypercall() -> Result<[u8; 3]> {
    let amd = fs::read_to_string("/proc/cpuinfo")?.contains("svm");
    Ok([0x0f, 0x01, if amd { 0xd9 } else { 0xc1 }])
}
