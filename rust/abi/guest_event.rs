// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Events of what the guest does by itself: it writes registers, hits breakpoints, accesses
//! descriptor-table registers, executes instructions. HYPERCALL has nothing specific.
//!
//! All are sent before anything is done, but SINGLESTEP, which is sent afterwards.

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

/// A control register whose writes can make events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cr {
    /// Operating mode.
    Cr0,
    /// Page tables.
    Cr3,
    /// Extensions.
    Cr4,
}

impl Cr {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cr0, Self::Cr3, Self::Cr4];

    /// Its number, as instructions and the wire have it.
    pub const fn number(self) -> u8 {
        match self {
            Self::Cr0 => 0,
            Self::Cr3 => 3,
            Self::Cr4 => 4,
        }
    }

    /// The one with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Cr0),
            3 => Some(Self::Cr3),
            4 => Some(Self::Cr4),
            _ => None,
        }
    }
}

/// What is specific to a CR event (`kvmi_vcpu_event_cr`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CrEvent {
    /// Which control register, see [`Cr`].
    pub cr: u8,
    /// 0.
    pub padding: [u8; 7],
    /// What it has.
    pub old_value: u64,
    /// What the guest writes.
    pub new_value: u64,
}

/// What is specific to an MSR event (`kvmi_vcpu_event_msr`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MsrEvent {
    /// Which MSR.
    pub msr: u32,
    /// 0.
    pub padding: u32,
    /// What it has.
    pub old_value: u64,
    /// What the guest writes.
    pub new_value: u64,
}

/// What follows the [`EventReply`](crate::vcpu::EventReply) to a CR or MSR event
/// (`kvmi_vcpu_event_cr_reply`, `kvmi_vcpu_event_msr_reply`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NewValueReply {
    /// What the register gets, if the action is to continue.
    pub new_val: u64,
}

/// What is specific to an XSETBV event (`kvmi_vcpu_event_xsetbv`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct XsetbvEvent {
    /// Which extended control register: 0.
    pub xcr: u8,
    /// 0.
    pub padding: [u8; 7],
    /// What it has.
    pub old_value: u64,
    /// What the guest writes.
    pub new_value: u64,
}

/// What is specific to a BREAKPOINT event (`kvmi_vcpu_event_breakpoint`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct BreakpointEvent {
    /// Guest physical address of the instruction, or
    /// [`GPA_UNMAPPED`](crate::vcpu::GPA_UNMAPPED).
    pub gpa: u64,
    /// Length of the instruction in bytes, with its prefixes, if the CPU tells; else 1.
    pub insn_len: u8,
    /// 0.
    pub padding: [u8; 7],
}

/// A descriptor-table register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DescriptorRegister {
    /// Interrupt descriptors.
    Idtr,
    /// Global descriptors.
    Gdtr,
    /// Local descriptors.
    Ldtr,
    /// The task.
    Tr,
}

impl DescriptorRegister {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Idtr, Self::Gdtr, Self::Ldtr, Self::Tr];

    /// Its number on the wire.
    pub const fn number(self) -> u8 {
        match self {
            Self::Idtr => 1,
            Self::Gdtr => 2,
            Self::Ldtr => 3,
            Self::Tr => 4,
        }
    }

    /// The one with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Idtr),
            2 => Some(Self::Gdtr),
            3 => Some(Self::Ldtr),
            4 => Some(Self::Tr),
            _ => None,
        }
    }
}

/// What is specific to a DESCRIPTOR event (`kvmi_vcpu_event_descriptor`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DescriptorEvent {
    /// Which register, see [`DescriptorRegister`].
    pub descriptor: u8,
    /// 1 if it is loaded, 0 if it is stored.
    pub write: u8,
    /// 0.
    pub padding: [u8; 6],
}

/// What is specific to a SINGLESTEP event (`kvmi_vcpu_event_singlestep`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SinglestepEvent {
    /// 0 if an instruction was executed, 1 if something else has happened instead.
    pub failed: u8,
    /// 0.
    pub padding: [u8; 7],
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes as _;

    const OLD: u64 = 0x0807_0605_0403_0201;
    const NEW: u64 = 0x1817_1615_1413_1211;
    const VALUES: [u8; 16] = [
        1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18,
    ];

    #[test]
    fn events_are_laid_out_as_the_protocol_says() {
        let cr = CrEvent {
            cr: 4,
            old_value: OLD,
            new_value: NEW,
            ..Default::default()
        };
        assert_eq!(
            cr.as_bytes(),
            [&[4, 0, 0, 0, 0, 0, 0, 0], &VALUES[..]].concat()
        );
        let msr = MsrEvent {
            msr: 0xc000_0082,
            old_value: OLD,
            new_value: NEW,
            ..Default::default()
        };
        assert_eq!(
            msr.as_bytes(),
            [&[0x82, 0, 0, 0xc0, 0, 0, 0, 0], &VALUES[..]].concat()
        );
        let xsetbv = XsetbvEvent {
            xcr: 1,
            old_value: OLD,
            new_value: NEW,
            ..Default::default()
        };
        assert_eq!(
            xsetbv.as_bytes(),
            [&[1, 0, 0, 0, 0, 0, 0, 0], &VALUES[..]].concat()
        );
        let breakpoint = BreakpointEvent {
            gpa: OLD,
            insn_len: 1,
            ..Default::default()
        };
        assert_eq!(
            breakpoint.as_bytes(),
            [&VALUES[..8], &[1, 0, 0, 0, 0, 0, 0, 0]].concat()
        );
        let descriptor = DescriptorEvent {
            descriptor: 3,
            write: 1,
            ..Default::default()
        };
        assert_eq!(descriptor.as_bytes(), [3, 1, 0, 0, 0, 0, 0, 0]);
        let step = SinglestepEvent {
            failed: 1,
            ..Default::default()
        };
        assert_eq!(step.as_bytes(), [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(NewValueReply { new_val: OLD }.as_bytes(), &VALUES[..8]);
    }

    #[test]
    fn registers_have_the_numbers_of_the_protocol() {
        let crs: Vec<_> = (0..=u8::MAX).filter_map(Cr::from_number).collect();
        assert_eq!(crs, Cr::ALL);
        assert_eq!(Cr::ALL.map(Cr::number), [0, 3, 4]);
        let tables = (0..=u8::MAX).filter_map(DescriptorRegister::from_number);
        assert_eq!(tables.collect::<Vec<_>>(), DescriptorRegister::ALL);
        let numbers = DescriptorRegister::ALL.map(DescriptorRegister::number);
        assert_eq!(numbers, [1, 2, 3, 4]);
    }
}
