// SPDX-License-Identifier: GPL-2.0 OR MIT

//! From a vCPU message to a request: every check that needs no vCPU.
//!
//! The receive thread looks at the header alone ([`VcpuMessage::parse`]), because the answers of
//! one vCPU are in the order of its commands; the vCPU's thread looks at the rest
//! ([`VcpuRequest::parse`]).

use zerocopy::FromBytes as _;

use crate::{
    arch::Regs,
    command::ControlEvents,
    error::KvmiError,
    guest_control::{
        ControlCr,
        ControlMsr,
        ControlSinglestep, //
    },
    guest_event::{
        Cr,
        NewValueReply, //
    },
    id::{
        Command,
        Event,
        Scope, //
    },
    policy::Policy,
    request::CloseReason,
    vcpu::{
        EventReply,
        GetCpuid,
        GetMtrrType,
        GetRegisters,
        GetRegistersReply,
        GetXcr,
        InjectException,
        MsrEntry,
        TranslateGva,
        XSAVE_SIZE, //
    },
    wire::{
        zero_extended,
        ErrorCode,
        VcpuHeader,
        MAX_MSG_SIZE, //
    },
};

/// A vCPU command with valid arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuRequest<'a> {
    /// `VCPU_GET_INFO`
    GetInfo,
    /// `VCPU_CONTROL_EVENTS`
    ControlEvents {
        /// Which event of the vCPU.
        event: Event,
        /// On or off.
        enable: bool,
    },
    /// `VCPU_GET_REGISTERS`
    GetRegisters(MsrList<'a>),
    /// `VCPU_SET_REGISTERS`
    SetRegisters(Regs),
    /// `VCPU_GET_CPUID`
    GetCpuid(GetCpuid),
    /// `VCPU_INJECT_EXCEPTION`
    InjectException(InjectException),
    /// `VCPU_CONTROL_CR`
    ControlCr {
        /// Whose writes make events, or do not.
        cr: Cr,
        /// On or off.
        enable: bool,
    },
    /// `VCPU_CONTROL_MSR`
    ControlMsr {
        /// Whose writes make events, or do not; one that
        /// [can be chosen](crate::guest_control::is_controllable_msr).
        msr: u32,
        /// On or off.
        enable: bool,
    },
    /// `VCPU_CONTROL_SINGLESTEP`, on or off
    ControlSinglestep(bool),
    /// `VCPU_GET_XCR` of XCR0
    GetXcr0,
    /// `VCPU_GET_XSAVE`
    GetXsave,
    /// `VCPU_SET_XSAVE`, with [`XSAVE_SIZE`] bytes
    SetXsave(&'a [u8]),
    /// `VCPU_GET_MTRR_TYPE` of this gpa
    GetMtrrType(u64),
    /// `VCPU_TRANSLATE_GVA` of this gva
    TranslateGva(u64),
}

/// The MSRs that GET_REGISTERS asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrList<'a>(&'a [u8]);

impl<'a> MsrList<'a> {
    /// The indices, in the order of the request.
    pub fn indices(&self) -> impl Iterator<Item = u32> + 'a {
        self.0
            .chunks_exact(size_of::<u32>())
            .filter_map(|index| u32::read_from_bytes(index).ok())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len() / size_of::<u32>()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'a> VcpuRequest<'a> {
    /// Makes a request of the part of a message that follows its vCPU header. That the command is
    /// served and allowed was checked when it was received.
    pub fn parse(command: Command, payload: &'a [u8], policy: &Policy) -> Result<Self, KvmiError> {
        match command {
            Command::VcpuGetInfo => Ok(Self::GetInfo),
            Command::VcpuControlEvents => control_events(payload, policy),
            Command::VcpuGetRegisters => get_registers(payload),
            Command::VcpuSetRegisters => Regs::read_from_prefix(payload)
                .map(|(regs, _)| Self::SetRegisters(regs))
                .map_err(|_| KvmiError::Inval),
            Command::VcpuGetCpuid => Ok(Self::GetCpuid(zero_extended(payload))),
            Command::VcpuInjectException => inject_exception(payload, policy),
            Command::VcpuControlCr => zero_extended::<ControlCr>(payload)
                .check(policy)
                .map(|(cr, enable)| Self::ControlCr { cr, enable }),
            Command::VcpuControlMsr => zero_extended::<ControlMsr>(payload)
                .check(policy)
                .map(|(msr, enable)| Self::ControlMsr { msr, enable }),
            Command::VcpuControlSinglestep => zero_extended::<ControlSinglestep>(payload)
                .check(policy)
                .map(Self::ControlSinglestep),
            Command::VcpuGetXcr => get_xcr(payload),
            Command::VcpuGetXsave => Ok(Self::GetXsave),
            Command::VcpuSetXsave => payload
                .get(..XSAVE_SIZE)
                .map(Self::SetXsave)
                .ok_or(KvmiError::Inval),
            Command::VcpuGetMtrrType => {
                Ok(Self::GetMtrrType(zero_extended::<GetMtrrType>(payload).gpa))
            }
            Command::VcpuTranslateGva => Ok(Self::TranslateGva(
                zero_extended::<TranslateGva>(payload).gva,
            )),
            _ => Err(KvmiError::NoSys),
        }
    }
}

fn control_events<'a>(payload: &[u8], policy: &Policy) -> Result<VcpuRequest<'a>, KvmiError> {
    let (event, enable) = zero_extended::<ControlEvents>(payload).check(Scope::Vcpu, policy)?;
    Ok(VcpuRequest::ControlEvents { event, enable })
}

fn get_registers(payload: &[u8]) -> Result<VcpuRequest<'_>, KvmiError> {
    let request: GetRegisters = zero_extended(payload);
    if request.padding1 != 0 || request.padding2 != 0 {
        return Err(KvmiError::Inval);
    }
    let nmsrs = usize::from(request.nmsrs);
    let reply =
        size_of::<ErrorCode>() + size_of::<GetRegistersReply>() + nmsrs * size_of::<MsrEntry>();
    if reply > MAX_MSG_SIZE {
        return Err(KvmiError::Inval);
    }
    let list = payload.get(size_of::<GetRegisters>()..).unwrap_or_default();
    list.get(..nmsrs * size_of::<u32>())
        .map(|list| VcpuRequest::GetRegisters(MsrList(list)))
        .ok_or(KvmiError::Inval)
}

fn inject_exception<'a>(payload: &[u8], policy: &Policy) -> Result<VcpuRequest<'a>, KvmiError> {
    if !policy.allows_event(Event::Trap) {
        return Err(KvmiError::Perm);
    }
    let request: InjectException = zero_extended(payload);
    if request.padding1 != 0 || request.padding2 != 0 {
        return Err(KvmiError::Inval);
    }
    Ok(VcpuRequest::InjectException(request))
}

fn get_xcr<'a>(payload: &[u8]) -> Result<VcpuRequest<'a>, KvmiError> {
    let request: GetXcr = zero_extended(payload);
    if request.padding != [0; 7] || request.xcr != 0 {
        return Err(KvmiError::Inval);
    }
    Ok(VcpuRequest::GetXcr0)
}

/// A vCPU command whose header is in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuMessage<'a> {
    /// Which command.
    pub command: Command,
    /// Index of the vCPU; whether it exists is for the caller to find out.
    pub vcpu: u16,
    /// What follows the vCPU header.
    pub payload: &'a [u8],
}

impl<'a> VcpuMessage<'a> {
    /// Checks the header of a vCPU command that is served and allowed.
    pub fn parse(command: Command, payload: &'a [u8]) -> Result<Self, KvmiError> {
        let header: VcpuHeader = zero_extended(payload);
        if header.padding1 != 0 || header.padding2 != 0 {
            return Err(KvmiError::Inval);
        }
        Ok(Self {
            command,
            vcpu: header.vcpu,
            payload: payload.get(size_of::<VcpuHeader>()..).unwrap_or_default(),
        })
    }
}

/// What a tool wants done about an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Go on as if not introspected.
    Continue,
    /// Enter the guest and let the instruction run again.
    Retry,
    /// Stop the VM.
    Crash,
}

impl Action {
    /// The number on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Self::Continue => 0,
            Self::Retry => 1,
            Self::Crash => 2,
        }
    }

    /// The action with the number `code`.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Continue),
            1 => Some(Self::Retry),
            2 => Some(Self::Crash),
            _ => None,
        }
    }
}

/// A reply to an event, of which all has been checked that needs no vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventAnswer {
    /// Index of the vCPU; whether it exists and waits for this is for the caller to find out.
    pub vcpu: u16,
    /// Which event is being replied to.
    pub event: Event,
    /// What to do about it.
    pub action: Action,
    /// What the register gets if the action is to continue; there is one if the event
    /// [has it](Event::has_new_value).
    pub new_value: Option<u64>,
}

impl EventAnswer {
    /// Makes sense of a message with the id of a vCPU event.
    pub fn parse(payload: &[u8]) -> Result<Self, CloseReason> {
        Self::decode(payload)
            .filter(|answer| answer.event.is_served())
            .ok_or(CloseReason::MalformedEventReply)
    }

    /// Takes a reply apart, be its event served or not. It has exactly the size of the event's: a
    /// truncated one must not be taken for zeros.
    fn decode(payload: &[u8]) -> Option<Self> {
        let (reply, rest) = EventReply::read_from_prefix(payload).ok()?;
        let header = reply.vcpu;
        if header.padding1 != 0 || header.padding2 != 0 {
            return None;
        }
        if reply.padding1 != 0 || reply.padding2 != 0 {
            return None;
        }
        let event = Event::from_id(reply.event.into()).filter(|e| e.scope() == Scope::Vcpu)?;
        let action = Action::from_code(reply.action)?;
        if action == Action::Retry && !event.can_retry() {
            return None;
        }
        let new_value = if event.has_new_value() {
            Some(NewValueReply::read_from_bytes(rest).ok()?.new_val)
        } else if rest.is_empty() {
            None
        } else {
            return None;
        };
        Some(Self {
            vcpu: header.vcpu,
            event,
            action,
            new_value,
        })
    }
}

#[cfg(test)]
#[path = "vcpu_request_tests.rs"]
mod tests;
