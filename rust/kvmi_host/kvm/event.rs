// SPDX-License-Identifier: GPL-2.0

//! What the guest is about to do, and the instructions that it has executed.

use kernel::{
    error::to_result,
    prelude::*, //
};
use kvmi_abi::{
    guest_event::{
        BreakpointEvent,
        Cr,
        CrEvent,
        DescriptorEvent,
        MsrEvent,
        SinglestepEvent,
        XsetbvEvent, //
    },
    Event,
    KvmiError, //
};
use kvmi_bindings as bindings;
use zerocopy::IntoBytes;

use super::CurrentVcpu;

/// Something that the guest is about to do, as kvm.ko reports it.
#[derive(Clone, Copy)]
pub(crate) struct GuestEvent {
    event: Event,
    nr: u32,
    old_value: u64,
    new_value: u64,
    gpa: u64,
    length: u8,
    load: u8,
    cpl: u8,
}

/// What is specific to the event of it.
pub(crate) enum Specific {
    Nothing,
    Cr(CrEvent),
    Msr(MsrEvent),
    Xsetbv(XsetbvEvent),
    Breakpoint(BreakpointEvent),
    Descriptor(DescriptorEvent),
}

impl Specific {
    /// The bytes that go on the wire.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Nothing => &[],
            Self::Cr(event) => event.as_bytes(),
            Self::Msr(event) => event.as_bytes(),
            Self::Xsetbv(event) => event.as_bytes(),
            Self::Breakpoint(event) => event.as_bytes(),
            Self::Descriptor(event) => event.as_bytes(),
        }
    }
}

/// The kind that kvm.ko has for an event of the protocol, if it is one that a guest makes.
fn kind(event: Event) -> Option<u32> {
    match event {
        Event::Cr => Some(bindings::KVMI_EVENT_CR),
        Event::Msr => Some(bindings::KVMI_EVENT_MSR),
        Event::Xsetbv => Some(bindings::KVMI_EVENT_XCR),
        Event::Breakpoint => Some(bindings::KVMI_EVENT_BREAKPOINT),
        Event::Descriptor => Some(bindings::KVMI_EVENT_DESCRIPTOR),
        Event::Hypercall => Some(bindings::KVMI_EVENT_HYPERCALL),
        _ => None,
    }
}

impl GuestEvent {
    fn from_raw(raw: &bindings::kvmi_event) -> Option<Self> {
        let event = Event::ALL
            .iter()
            .copied()
            .find(|&event| kind(event) == Some(raw.kind))?;
        Some(Self {
            event,
            nr: raw.nr,
            old_value: raw.old_value,
            new_value: raw.new_value,
            gpa: raw.gpa,
            length: raw.length,
            load: raw.load,
            cpl: raw.cpl,
        })
    }

    fn to_raw(self) -> bindings::kvmi_event {
        bindings::kvmi_event {
            // Always there: `from_raw()` has found it.
            kind: kind(self.event).unwrap_or_default(),
            nr: self.nr,
            old_value: self.old_value,
            new_value: self.new_value,
            gpa: self.gpa,
            length: self.length,
            load: self.load,
            cpl: self.cpl,
            ..Default::default()
        }
    }

    /// Which event the tool gets.
    pub(crate) fn event(&self) -> Event {
        self.event
    }

    /// Privilege level of the code that does it.
    pub(crate) fn cpl(&self) -> u8 {
        self.cpl
    }

    /// What else the tool is told. Registers and descriptor tables have numbers of the protocol.
    pub(crate) fn specific(&self) -> Specific {
        let Self {
            old_value,
            new_value,
            ..
        } = *self;
        // Lossless: CR4, XCR0 and TR are the highest of them.
        let nr = self.nr as u8;
        match self.event {
            Event::Cr => Specific::Cr(CrEvent {
                cr: nr,
                padding: [0; 7],
                old_value,
                new_value,
            }),
            Event::Msr => Specific::Msr(MsrEvent {
                msr: self.nr,
                padding: 0,
                old_value,
                new_value,
            }),
            Event::Xsetbv => Specific::Xsetbv(XsetbvEvent {
                xcr: nr,
                padding: [0; 7],
                old_value,
                new_value,
            }),
            Event::Breakpoint => Specific::Breakpoint(BreakpointEvent {
                gpa: self.gpa,
                insn_len: self.length,
                padding: [0; 7],
            }),
            Event::Descriptor => Specific::Descriptor(DescriptorEvent {
                descriptor: nr,
                write: self.load,
                padding: [0; 6],
            }),
            _ => Specific::Nothing,
        }
    }

    /// The same as the tool has let it go on: with another value for the register perhaps; a call has
    /// been taken. What nobody has answered goes on as it is.
    pub(crate) fn answered(mut self, new_value: Option<u64>) -> Self {
        self.new_value = match self.event {
            Event::Hypercall => 0,
            _ => new_value.unwrap_or(self.new_value),
        };
        self
    }
}

impl CurrentVcpu {
    /// Has an event of the guest reported, or not any more.
    pub(crate) fn track(&self, event: Event, on: bool) -> Result<(), KvmiError> {
        let Some(kind) = kind(event) else {
            return Ok(());
        };
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        to_result(unsafe { bindings::kvmi_vcpu_track(self.as_ptr(), kind, on) })
            .map_err(tracking_error)
    }

    /// Which control registers CR events are about.
    pub(crate) fn track_cr(&self, cr: Cr, on: bool) {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_track_cr(self.as_ptr(), cr.number().into(), on) };
    }

    /// Which MSRs MSR events are about. May sleep.
    pub(crate) fn track_msr(&self, msr: u32, on: bool) -> Result<(), KvmiError> {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        to_result(unsafe { bindings::kvmi_vcpu_track_msr(self.as_ptr(), msr, on) })
            .map_err(tracking_error)
    }

    /// Has nothing reported any more, neither events nor instructions. May sleep.
    pub(crate) fn track_nothing(&self) {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_track_nothing(self.as_ptr()) };
    }

    /// Takes what the guest is about to do, if nobody has.
    pub(crate) fn guest_event(&self) -> Option<GuestEvent> {
        let mut raw = bindings::kvmi_event::default();
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_get_event(self.as_ptr(), &mut raw) }
            .then(|| GuestEvent::from_raw(&raw))
            .flatten()
    }

    /// Has the guest do that, if it still wants to.
    pub(crate) fn decide(&self, event: &GuestEvent) {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_decide(self.as_ptr(), &event.to_raw()) };
    }

    /// Whether the guest could not have the value of an earlier [`Self::decide`]. Says so once.
    pub(crate) fn was_refused(&self) -> bool {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_get_refusal(self.as_ptr()) }
    }

    /// Has each instruction reported, or not any more. May sleep.
    pub(crate) fn trace(&self, on: bool) -> Result<(), KvmiError> {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        to_result(unsafe { bindings::kvmi_vcpu_trace(self.as_ptr(), on) }).map_err(tracking_error)
    }

    /// Takes the instruction that is over, if nobody has.
    pub(crate) fn step(&self) -> Option<SinglestepEvent> {
        let mut lost = false;
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_get_step(self.as_ptr(), &mut lost) }.then(|| SinglestepEvent {
            failed: lost.into(),
            ..SinglestepEvent::default()
        })
    }
}

/// Whether this CPU can tell of each instruction.
pub(crate) fn can_trace() -> bool {
    // SAFETY: There are no preconditions.
    unsafe { bindings::kvmi_can_trace() }
}

/// Tells the tool why something cannot be reported.
fn tracking_error(error: Error) -> KvmiError {
    if error.to_errno() == -(kernel::bindings::EOPNOTSUPP as i32) {
        KvmiError::OpNotSupp
    } else if error == EBUSY {
        KvmiError::Busy
    } else if error == EPERM {
        KvmiError::Perm
    } else if error == ENOMEM {
        KvmiError::NoMem
    } else {
        KvmiError::Inval
    }
}
