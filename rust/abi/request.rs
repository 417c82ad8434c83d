// SPDX-License-Identifier: GPL-2.0 OR MIT

//! From a message to a request: every check that needs no VM.

use crate::{
    access::PageList,
    command::{flag, CheckId, ControlCleanup, ControlEvents, GuestRange},
    error::KvmiError,
    id::{Command, Event, Scope, VCPU_EVENT},
    policy::Policy,
    token::GetMapToken,
    vcpu::PauseVcpu,
    vcpu_request::{EventAnswer, VcpuMessage},
    wire::{zero_extended, Header},
};

/// A command with valid arguments that the tool is allowed to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// `GET_VERSION`
    GetVersion,
    /// `VM_CHECK_COMMAND` of this id
    CheckCommand(u16),
    /// `VM_CHECK_EVENT` of this id
    CheckEvent(u16),
    /// `VM_GET_INFO`
    GetInfo,
    /// `VM_CONTROL_EVENTS`
    ControlEvents {
        /// Which event of the VM.
        event: Event,
        /// On or off.
        enable: bool,
    },
    /// `VM_READ_PHYSICAL`
    ReadPhysical {
        /// First guest physical address.
        gpa: u64,
        /// Bytes, 1 to 4096, not beyond the end of the page.
        len: usize,
    },
    /// `VM_WRITE_PHYSICAL`
    WritePhysical {
        /// First guest physical address.
        gpa: u64,
        /// 1 to 4096 bytes, not beyond the end of the page.
        data: &'a [u8],
    },
    /// `VM_PAUSE_VCPU`
    PauseVcpu {
        /// Index of the vCPU; whether it exists is for the caller to find out.
        vcpu: u16,
        /// Whether the reply waits until the vCPU is out of the guest.
        wait: bool,
    },
    /// `VM_CONTROL_CLEANUP`
    ControlCleanup {
        /// Whether unhooking restores interceptions.
        enable: bool,
    },
    /// `VM_SET_PAGE_ACCESS`
    SetPageAccess(PageList<'a>),
    /// `VM_GET_MAP_TOKEN`
    GetMapToken {
        /// Whether the pages may be written to.
        writable: bool,
    },
    /// A command for a vCPU.
    Vcpu(VcpuMessage<'a>),
    /// The reply to an event of a vCPU.
    EventReply(EventAnswer),
}

/// Why a message is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// The tool gets an error and may go on.
    Reply(KvmiError),
    /// The stream cannot be trusted any more.
    Close(CloseReason),
}

/// Why the host closes a connection because of what it received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// A header announces more than a message may have.
    Oversized,
    /// A command with an array ends before its array does.
    Truncated,
    /// A reply to an event is not what the event wants.
    MalformedEventReply,
    /// A reply to an event that no vCPU waits for.
    UnexpectedEventReply,
}

impl From<KvmiError> for Reject {
    fn from(error: KvmiError) -> Self {
        Self::Reply(error)
    }
}

impl<'a> Request<'a> {
    /// Makes a request of a message, in the order of checks that the protocol prescribes: known,
    /// allowed, valid.
    pub fn parse(header: &Header, payload: &'a [u8], policy: &Policy) -> Result<Self, Reject> {
        if header.id == VCPU_EVENT {
            // An error reply with this id could not be told from an event, so there is none.
            return EventAnswer::parse(payload)
                .map(Self::EventReply)
                .map_err(Reject::Close);
        }
        let command = Command::from_id(header.id)
            .filter(|c| c.is_served())
            .ok_or(KvmiError::NoSys)?;
        if !policy.allows_command(command) {
            return Err(KvmiError::Perm.into());
        }

        match command {
            Command::GetVersion => Ok(Self::GetVersion),
            Command::VmCheckCommand => Ok(Self::CheckCommand(check_id(payload)?)),
            Command::VmCheckEvent => Ok(Self::CheckEvent(check_id(payload)?)),
            Command::VmGetInfo => Ok(Self::GetInfo),
            Command::VmControlEvents => control_events(payload, policy),
            Command::VmReadPhysical => read_physical(payload),
            Command::VmWritePhysical => write_physical(payload),
            Command::VmControlCleanup => control_cleanup(payload),
            Command::VmPauseVcpu => pause_vcpu(payload, policy),
            Command::VmSetPageAccess => PageList::parse(payload).map(Self::SetPageAccess),
            Command::VmGetMapToken => Ok(Self::GetMapToken {
                writable: GetMapToken::parse(payload)?,
            }),
            _ => Ok(Self::Vcpu(VcpuMessage::parse(command, payload)?)),
        }
    }
}

fn check_id(payload: &[u8]) -> Result<u16, KvmiError> {
    let check: CheckId = zero_extended(payload);
    if check.padding1 != 0 || check.padding2 != 0 {
        return Err(KvmiError::Inval);
    }
    Ok(check.id)
}

fn control_events<'a>(payload: &[u8], policy: &Policy) -> Result<Request<'a>, Reject> {
    let (event, enable) = zero_extended::<ControlEvents>(payload).check(Scope::Vm, policy)?;
    Ok(Request::ControlEvents { event, enable })
}

fn pause_vcpu<'a>(payload: &[u8], policy: &Policy) -> Result<Request<'a>, Reject> {
    let request: PauseVcpu = zero_extended(payload);
    let wait = flag(request.wait)?;
    if request.padding1 != 0 || request.padding2 != 0 {
        return Err(KvmiError::Inval.into());
    }
    if !policy.allows_event(Event::Pause) {
        return Err(KvmiError::Perm.into());
    }
    Ok(Request::PauseVcpu {
        vcpu: request.vcpu,
        wait,
    })
}

fn read_physical<'a>(payload: &[u8]) -> Result<Request<'a>, Reject> {
    let range: GuestRange = zero_extended(payload);
    if !range.is_valid() {
        return Err(KvmiError::Inval.into());
    }
    Ok(Request::ReadPhysical {
        gpa: range.gpa,
        len: range.size.into(),
    })
}

fn write_physical(payload: &[u8]) -> Result<Request<'_>, Reject> {
    const TRUNCATED: Reject = Reject::Close(CloseReason::Truncated);
    let range: GuestRange = zero_extended(payload);
    let data = payload.get(size_of::<GuestRange>()..).ok_or(TRUNCATED)?;
    let data = data.get(..range.size.into()).ok_or(TRUNCATED)?;
    if !range.is_valid() {
        return Err(KvmiError::Inval.into());
    }
    Ok(Request::WritePhysical {
        gpa: range.gpa,
        data,
    })
}

fn control_cleanup<'a>(payload: &[u8]) -> Result<Request<'a>, Reject> {
    let control: ControlCleanup = zero_extended(payload);
    if control.padding != [0; 7] {
        return Err(KvmiError::Inval.into());
    }
    Ok(Request::ControlCleanup {
        enable: flag(control.enable)?,
    })
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
