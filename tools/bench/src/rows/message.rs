// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Messages, and how large their replies are.

use kvmi_client::abi::{
    command::{GetVersionReply, GuestRange},
    event::{EventHeader, VcpuEvent},
    vcpu::{EventReply, GetRegisters, GetRegistersReply, PauseVcpu},
    wire::{Header, ReplyHead, VcpuHeader},
    Command,
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
}
