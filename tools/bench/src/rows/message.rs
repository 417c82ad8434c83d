// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Messages, and how large their replies are.

use anyhow::Result;
use kvmi_client::abi::{
    access::{PageAccess, PfEvent, SetPageAccess},
    command::{GetVersionReply, GuestRange},
    event::{EventHeader, VcpuEvent},
    guest_event::{
        BreakpointEvent, CrEvent, DescriptorEvent, MsrEvent, NewValueReply, SinglestepEvent,
        XsetbvEvent,
    },
    vcpu::{EventReply, GetRegisters, GetRegistersReply, PauseVcpu, TrapEvent},
    wire::{Header, ReplyHead, VcpuHeader},
    Action, Command, Event,
};
use tiny_vm::SCRATCH;
use zerocopy::{FromBytes as _, IntoBytes as _};

/// A command, and the size of its reply.
pub struct Exchange {
    /// All bytes of the command.
    pub request: Vec<u8>,
    /// Size of all of the reply.
    pub reply: usize,
}

/// Size of an event of a vCPU that has nothing of its own.
pub const EVENT: usize = size_of::<Header>() + size_of::<EventHeader>() + size_of::<VcpuEvent>();
/// Size of the reply to an event.
pub const EVENT_REPLY: usize = size_of::<Header>() + size_of::<EventReply>();

impl Exchange {
    fn new(command: Command, parts: &[&[u8]], data: usize) -> Self {
        let payload = parts.concat();
        // Lossless: the requests here are short.
        let size = payload.len() as u16;
        let header = Header {
            id: command.id(),
            size,
            seq: 1,
        };
        Self {
            request: [header.as_bytes(), &payload].concat(),
            reply: size_of::<ReplyHead>() + data,
        }
    }

    /// `GET_VERSION`
    pub fn get_version() -> Self {
        Self::new(Command::GetVersion, &[], size_of::<GetVersionReply>())
    }

    /// `VM_READ_PHYSICAL`
    pub fn read_physical(size: u16) -> Self {
        let range = GuestRange {
            gpa: SCRATCH,
            size,
            ..Default::default()
        };
        Self::new(Command::VmReadPhysical, &[range.as_bytes()], size.into())
    }

    /// `VCPU_GET_REGISTERS` of vCPU 0, without MSRs.
    pub fn get_registers() -> Self {
        let (vcpu, request) = (VcpuHeader::default(), GetRegisters::default());
        let parts = [vcpu.as_bytes(), request.as_bytes()];
        Self::new(
            Command::VcpuGetRegisters,
            &parts,
            size_of::<GetRegistersReply>(),
        )
    }

    /// `VM_PAUSE_VCPU` of vCPU 0, without waiting.
    pub fn pause() -> Self {
        let request = PauseVcpu::default();
        Self::new(Command::VmPauseVcpu, &[request.as_bytes()], 0)
    }

    /// `VM_SET_PAGE_ACCESS` of 511 pages at most.
    pub fn set_page_access(pages: &[PageAccess]) -> Self {
        let request = SetPageAccess {
            // Lossless: a message has no room for more.
            count: pages.len() as u16,
            ..Default::default()
        };
        let parts = [request.as_bytes(), pages.as_bytes()];
        Self::new(Command::VmSetPageAccess, &parts, 0)
    }
}

/// Size of an event of a vCPU.
pub fn event_size(event: Event) -> usize {
    EVENT
        + match event {
            Event::Pf => size_of::<PfEvent>(),
            Event::Cr => size_of::<CrEvent>(),
            Event::Msr => size_of::<MsrEvent>(),
            Event::Xsetbv => size_of::<XsetbvEvent>(),
            Event::Breakpoint => size_of::<BreakpointEvent>(),
            Event::Descriptor => size_of::<DescriptorEvent>(),
            Event::Singlestep => size_of::<SinglestepEvent>(),
            Event::Trap => size_of::<TrapEvent>(),
            Event::Pause | Event::Hypercall | Event::Unhook => 0,
        }
}

/// The reply to this message, an event of vCPU 0. A register gets what the guest has written.
pub fn event_reply(message: &[u8], event: Event, action: Action) -> Result<Vec<u8>> {
    let (header, _) = Header::read_from_prefix(message).map_err(|_| super::short())?;
    let value: &[u8] = if event.has_new_value() {
        // It is the last part of all those that have one.
        let value = message.last_chunk::<{ size_of::<NewValueReply>() }>();
        value.ok_or_else(super::short)?
    } else {
        &[]
    };
    let reply = EventReply {
        // Lossless: ids of events are below 20.
        event: event.id() as u8,
        action: action.code(),
        ..Default::default()
    };
    let header = Header {
        // Lossless: 24 at most.
        size: (size_of::<EventReply>() + value.len()) as u16,
        ..header
    };
    Ok([header.as_bytes(), reply.as_bytes(), value].concat())
}
