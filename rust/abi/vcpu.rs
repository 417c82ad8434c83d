// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Structures of vCPU commands and of their replies; of vCPU events and of the replies to them.
//!
//! A vCPU command's payload begins with a [`VcpuHeader`](crate::wire::VcpuHeader); the requests
//! here follow it. The registers of GET_REGISTERS and SET_REGISTERS are in [`crate::arch`].

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

use crate::{
    arch::{
        Regs,
        Sregs, //
    },
    wire::VcpuHeader, //
};

/// Size of the XSAVE area of GET_XSAVE and SET_XSAVE, in bytes.
pub const XSAVE_SIZE: usize = 4096;

/// Pause requests that a vCPU may have pending.
pub const MAX_PENDING_PAUSES: u32 = 1001;

/// [`TranslateGva`]'s answer for an address that is not mapped.
pub const GPA_UNMAPPED: u64 = u64::MAX;

/// Vector of [`TrapEvent`] that says that an injected exception got lost.
pub const NO_EXCEPTION: u8 = 0xff;

/// Request of `VM_PAUSE_VCPU` (`kvmi_vm_pause_vcpu`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PauseVcpu {
    /// Index of the vCPU.
    pub vcpu: u16,
    /// 1 if the reply shall wait until the vCPU is out of the guest, 0 if not.
    pub wait: u8,
    /// 0.
    pub padding1: u8,
    /// 0.
    pub padding2: u32,
}

/// Reply to `VCPU_GET_INFO` (`kvmi_vcpu_get_info_reply`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VcpuInfo {
    /// Frequency of the guest's TSC in Hz.
    pub tsc_speed: u64,
}

/// Request of `VCPU_GET_REGISTERS` (`kvmi_vcpu_get_registers`); the indices of the MSRs follow, 32
/// bits each.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GetRegisters {
    /// Number of MSRs.
    pub nmsrs: u16,
    /// 0.
    pub padding1: u16,
    /// 0.
    pub padding2: u32,
}

/// Reply to `VCPU_GET_REGISTERS` (`kvmi_vcpu_get_registers_reply`); an [`MsrEntry`] for each MSR
/// follows.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GetRegistersReply {
    /// Default operand size of the code being run, in bytes: 2, 4 or 8.
    pub mode: u32,
    /// 0.
    pub padding: u32,
    /// General registers.
    pub regs: Regs,
    /// System registers.
    pub sregs: Sregs,
    /// Number of MSRs that follow.
    pub nmsrs: u32,
    /// 0.
    pub pad: u32,
}

/// An MSR and its value (`kvm_msr_entry`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MsrEntry {
    /// Which MSR.
    pub index: u32,
    /// 0.
    pub reserved: u32,
    /// Its value.
    pub data: u64,
}

/// Request of `VCPU_GET_CPUID` (`kvmi_vcpu_get_cpuid`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GetCpuid {
    /// Leaf.
    pub function: u32,
    /// Subleaf.
    pub index: u32,
}

/// Reply to `VCPU_GET_CPUID` (`kvmi_vcpu_get_cpuid_reply`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CpuidReply {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// Request of `VCPU_INJECT_EXCEPTION` (`kvmi_vcpu_inject_exception`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct InjectException {
    /// Vector.
    pub nr: u8,
    /// 0.
    pub padding1: u8,
    /// 0.
    pub padding2: u16,
    /// Error code, for vectors that have one.
    pub error_code: u32,
    /// Address of a page fault.
    pub address: u64,
}

/// Request of `VCPU_GET_XCR` (`kvmi_vcpu_get_xcr`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GetXcr {
    /// Which one: 0.
    pub xcr: u8,
    /// 0.
    pub padding: [u8; 7],
}

/// Reply to `VCPU_GET_XCR` (`kvmi_vcpu_get_xcr_reply`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct XcrReply {
    /// Value.
    pub value: u64,
}

/// Request of `VCPU_GET_MTRR_TYPE` (`kvmi_vcpu_get_mtrr_type`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GetMtrrType {
    /// Guest physical address.
    pub gpa: u64,
}

/// Reply to `VCPU_GET_MTRR_TYPE` (`kvmi_vcpu_get_mtrr_type_reply`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MtrrTypeReply {
    /// Memory type as in an MTRR: 0 UC, 1 WC, 4 WT, 5 WP, 6 WB.
    pub type_: u8,
    /// 0.
    pub padding: [u8; 7],
}

/// Request of `VCPU_TRANSLATE_GVA` (`kvmi_vcpu_translate_gva`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TranslateGva {
    /// Guest virtual address.
    pub gva: u64,
}

/// Reply to `VCPU_TRANSLATE_GVA` (`kvmi_vcpu_translate_gva_reply`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TranslateGvaReply {
    /// Guest physical address, or [`GPA_UNMAPPED`].
    pub gpa: u64,
}

/// What is specific to a TRAP event (`kvmi_vcpu_event_trap`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TrapEvent {
    /// Vector of the exception that is about to be delivered, or [`NO_EXCEPTION`].
    pub nr: u8,
    /// 0.
    pub padding1: u8,
    /// 0.
    pub padding2: u16,
    /// Its error code, if it has one.
    pub error_code: u32,
    /// CR2 for a page fault.
    pub address: u64,
}

/// Reply to a vCPU event (`kvmi_vcpu_event_reply`); for some events more follows.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct EventReply {
    /// Which vCPU.
    pub vcpu: VcpuHeader,
    /// See [`Action`](crate::vcpu_request::Action).
    pub action: u8,
    /// Which event is being replied to.
    pub event: u8,
    /// 0.
    pub padding1: u16,
    /// 0.
    pub padding2: u32,
}
