// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Messages, and how large their replies are.

use kvmi_client::abi::{
    access::{PageAccess, PfEvent, SetPageAccess},
    command::{GetVersionReply, GuestRange},
    event::{EventHeader, VcpuEvent},
    vcpu::{EventReply, GetRegisters, GetRegistersReply, PauseVcpu},
    wire::{Header, ReplyHead, VcpuHeader},
    Action, Command, Event,
};
use tiny_vm::SCRATCH;
use zerocopy::IntoBytes as _;

/// A command, and the size of its reply.
pub struct Exchange {
    /// All bytes of the command.
    pub request: Vec<u8>,
    /// Size of all of the reply.
    pub reply: usize,
}

/// Size of an event of a vCPU that has nothing of its own.
pub const EVENT: usize = size_of::<Header>() + size_of::<EventHeader>() + size_of::<VcpuEvent>();
/// Size of a PF event.
pub const PF_EVENT: usize = EVENT + size_of::<PfEvent>();
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

/// The reply to the event of vCPU 0 with this header.
pub fn event_reply(header: Header, event: Event, action: Action) -> Vec<u8> {
    let header = Header {
        // Lossless: 16.
        size: size_of::<EventReply>() as u16,
        ..header
    };
    let reply = EventReply {
        // Lossless: ids of events are below 20.
        event: event.id() as u8,
        action: action.code(),
        ..Default::default()
    };
    [header.as_bytes(), reply.as_bytes()].concat()
}
