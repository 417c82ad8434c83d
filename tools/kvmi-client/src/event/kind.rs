// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What has happened on a vCPU.

use kvmi_abi::{
    access::{PfEvent, GVA_UNKNOWN},
    guest_event::{
        BreakpointEvent, Cr, CrEvent, DescriptorEvent, DescriptorRegister, MsrEvent,
        SinglestepEvent, XsetbvEvent,
    },
    vcpu::{TrapEvent, GPA_UNMAPPED},
    Event as EventId,
};

use super::split;
use crate::{access::Access, error::ProtocolError};

/// What has happened on a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuEventKind {
    /// The vCPU was paused on request.
    Pause,
    /// The guest calls the tool: it executes the hypercall instruction with the arguments that the
    /// protocol prescribes. It gets 0 from [`Action::Continue`](crate::Action::Continue).
    Hypercall,
    /// The guest is about to execute a breakpoint instruction, at its rip.
    /// [`Action::Continue`](crate::Action::Continue) lets the guest have the exception,
    /// [`Action::Retry`](crate::Action::Retry) has the vCPU execute what is there now, or where its
    /// rip was set to.
    Breakpoint {
        /// Guest physical address of the instruction, if it is known.
        gpa: Option<u64>,
        /// Length of the instruction in bytes.
        insn_len: u8,
    },
    /// The guest writes a control register that was
    /// [chosen](crate::Connection::control_cr), and the value is another one than it has.
    Cr {
        /// Which one.
        cr: Cr,
        /// What it has.
        old: u64,
        /// What the guest writes.
        new: u64,
    },
    /// An exception is about to be delivered: that which was injected, or another one that has
    /// taken its place.
    Trap {
        /// Its vector, or [`NO_EXCEPTION`](kvmi_abi::vcpu::NO_EXCEPTION) if the injected exception
        /// got lost.
        nr: u8,
        /// Its error code, if it has one.
        error_code: u32,
        /// CR2 for a page fault.
        address: u64,
    },
    /// The guest writes an extended control register, and the value is another one than it has.
    Xsetbv {
        /// Which one.
        xcr: u8,
        /// What it has.
        old: u64,
        /// What the guest writes.
        new: u64,
    },
    /// The guest accesses a descriptor-table register.
    /// [`Action::Continue`](crate::Action::Continue) has the instruction executed,
    /// [`Action::Retry`](crate::Action::Retry) has the vCPU execute it anew.
    Descriptor {
        /// Which one.
        register: DescriptorRegister,
        /// Whether it is loaded, as opposed to stored.
        write: bool,
    },
    /// The guest writes an MSR that was [chosen](crate::Connection::control_msr), and the value is
    /// another one than it has.
    Msr {
        /// Which one.
        msr: u32,
        /// What it has.
        old: u64,
        /// What the guest writes.
        new: u64,
    },
    /// The guest tries what it is denied, see [`Connection::set_page_access`]. Nothing is done yet:
    /// [`Action::Continue`] has the instruction do it this once, [`Action::Retry`] has the vCPU try
    /// again, or go on where its registers were set to. An instruction makes one event for each
    /// page and kind of access, as far as it gets.
    ///
    /// [`Connection::set_page_access`]: crate::Connection::set_page_access
    /// [`Action::Continue`]: crate::Action::Continue
    /// [`Action::Retry`]: crate::Action::Retry
    Pf {
        /// Virtual address, if it is known.
        gva: Option<u64>,
        /// Guest physical address of the first byte in the page.
        gpa: u64,
        /// What the guest tries.
        access: Access,
    },
    /// The guest has executed one instruction, and the next one is at its rip; see
    /// [`control_singlestep`](crate::Connection::control_singlestep).
    Singlestep {
        /// Something else has happened instead.
        failed: bool,
    },
    /// An event that this version of the crate does not know.
    Unknown {
        /// Which event.
        id: u8,
        /// What is specific to the event.
        data: Vec<u8>,
    },
}

impl VcpuEventKind {
    /// The event's id, as the reply has it.
    pub fn id(&self) -> u8 {
        match self {
            Self::Pause => PAUSE,
            Self::Hypercall => HYPERCALL,
            Self::Breakpoint { .. } => BREAKPOINT,
            Self::Cr { .. } => CR,
            Self::Trap { .. } => TRAP,
            Self::Xsetbv { .. } => XSETBV,
            Self::Descriptor { .. } => DESCRIPTOR,
            Self::Msr { .. } => MSR,
            Self::Pf { .. } => PF,
            Self::Singlestep { .. } => SINGLESTEP,
            Self::Unknown { id, .. } => *id,
        }
    }

    /// What the guest writes to a register, if the reply says what that gets.
    pub fn new_value(&self) -> Option<u64> {
        match self {
            Self::Cr { new, .. } | Self::Msr { new, .. } => Some(*new),
            _ => None,
        }
    }

    /// Makes sense of what is specific to the event `id`.
    pub(super) fn decode(id: u8, data: &[u8]) -> Result<Self, ProtocolError> {
        let impossible = |register| ProtocolError::ImpossibleRegister {
            event: id,
            register,
        };
        Ok(match id {
            PAUSE => Self::Pause,
            HYPERCALL => Self::Hypercall,
            BREAKPOINT => {
                let (breakpoint, _) = split::<BreakpointEvent>(data)?;
                Self::Breakpoint {
                    gpa: Some(breakpoint.gpa).filter(|gpa| *gpa != GPA_UNMAPPED),
                    insn_len: breakpoint.insn_len,
                }
            }
            CR => {
                let (write, _) = split::<CrEvent>(data)?;
                Self::Cr {
                    cr: Cr::from_number(write.cr).ok_or_else(|| impossible(write.cr))?,
                    old: write.old_value,
                    new: write.new_value,
                }
            }
            TRAP => {
                let (trap, _) = split::<TrapEvent>(data)?;
                Self::Trap {
                    nr: trap.nr,
                    error_code: trap.error_code,
                    address: trap.address,
                }
            }
            XSETBV => {
                let (write, _) = split::<XsetbvEvent>(data)?;
                Self::Xsetbv {
                    xcr: write.xcr,
                    old: write.old_value,
                    new: write.new_value,
                }
            }
            DESCRIPTOR => {
                let (access, _) = split::<DescriptorEvent>(data)?;
                let register = DescriptorRegister::from_number(access.descriptor);
                Self::Descriptor {
                    register: register.ok_or_else(|| impossible(access.descriptor))?,
                    write: access.write != 0,
                }
            }
            MSR => {
                let (write, _) = split::<MsrEvent>(data)?;
                Self::Msr {
                    msr: write.msr,
                    old: write.old_value,
                    new: write.new_value,
                }
            }
            PF => {
                let (pf, _) = split::<PfEvent>(data)?;
                let access = Access::from_bits(pf.access).filter(|access| !access.is_empty());
                Self::Pf {
                    gva: Some(pf.gva).filter(|gva| *gva != GVA_UNKNOWN),
                    gpa: pf.gpa,
                    access: access.ok_or(ProtocolError::ImpossibleAccess(pf.access))?,
                }
            }
            SINGLESTEP => {
                let (step, _) = split::<SinglestepEvent>(data)?;
                Self::Singlestep {
                    failed: step.failed != 0,
                }
            }
            _ => Self::Unknown {
                id,
                data: data.to_vec(),
            },
        })
    }
}

// Ids of events are below 32, so nothing is lost.
const PAUSE: u8 = EventId::Pause.id() as u8;
const HYPERCALL: u8 = EventId::Hypercall.id() as u8;
const BREAKPOINT: u8 = EventId::Breakpoint.id() as u8;
const CR: u8 = EventId::Cr.id() as u8;
const TRAP: u8 = EventId::Trap.id() as u8;
const XSETBV: u8 = EventId::Xsetbv.id() as u8;
const DESCRIPTOR: u8 = EventId::Descriptor.id() as u8;
const MSR: u8 = EventId::Msr.id() as u8;
const PF: u8 = EventId::Pf.id() as u8;
const SINGLESTEP: u8 = EventId::Singlestep.id() as u8;
