// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Events, decoded.

mod kind;

use kvmi_abi::{
    arch::VcpuEventArch,
    event::{EventHeader, VcpuEvent as Common},
    id::{VCPU_EVENT, VM_EVENT},
    Event as EventId,
};

pub use self::kind::VcpuEventKind;
use crate::{decoder::Message, error::ProtocolError};

/// Something that the host tells without being asked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The VM is about to be unhooked: the tool should undo what it changed and close the
    /// connection.
    Unhook {
        /// Number of the event in its session.
        seq: u32,
    },
    /// Something happened on a vCPU, which waits for a reply.
    Vcpu(Box<VcpuEvent>),
    /// An event of the VM that this version of the crate does not know; it needs no reply.
    Unknown {
        /// Which event.
        id: u16,
        /// Number of the event in its session.
        seq: u32,
        /// What follows the event's header.
        data: Vec<u8>,
    },
}

/// An event of a vCPU.
#[derive(Clone, Debug)]
pub struct VcpuEvent {
    /// Number of the event in its session; the reply has to carry it.
    pub seq: u32,
    /// Index of the vCPU.
    pub vcpu: u16,
    /// State of the vCPU.
    pub arch: VcpuEventArch,
    /// What has happened.
    pub kind: VcpuEventKind,
}

/// Splits a `T` off the start of `bytes`.
fn split<T: zerocopy::FromBytes>(bytes: &[u8]) -> Result<(T, &[u8]), ProtocolError> {
    T::read_from_prefix(bytes).map_err(|_| ProtocolError::Size {
        got: bytes.len(),
        wanted: size_of::<T>(),
    })
}

impl Event {
    /// Makes an event of a message; gives `None` if the message is a reply.
    pub fn decode(message: &Message) -> Result<Option<Self>, ProtocolError> {
        let of_vm = match message.header.id {
            VM_EVENT => true,
            VCPU_EVENT => false,
            _ => return Ok(None),
        };
        let (header, rest) = split::<EventHeader>(&message.payload)?;
        let id = header.event;
        // Even ids are the VM's.
        if of_vm != (id % 2 == 0) {
            return Err(ProtocolError::ImpossibleEvent(id));
        }
        let seq = message.header.seq;
        Ok(Some(match (of_vm, EventId::from_id(id)) {
            (true, Some(EventId::Unhook)) => Self::Unhook { seq },
            (true, _) => Self::Unknown {
                id,
                seq,
                data: rest.to_vec(),
            },
            (false, _) => Self::Vcpu(Box::new(VcpuEvent::decode(id, seq, rest)?)),
        }))
    }
}

impl VcpuEvent {
    fn decode(id: u16, seq: u32, payload: &[u8]) -> Result<Self, ProtocolError> {
        let (common, _) = split::<Common>(payload)?;
        // The structure may have grown: what is specific to the event begins where it says.
        let size = usize::from(common.size);
        let too_small = size < size_of::<Common>();
        let data = payload
            .get(size..)
            .filter(|_| !too_small)
            .ok_or(ProtocolError::Size {
                got: payload.len().min(size),
                wanted: size.max(size_of::<Common>()),
            })?;
        let id = u8::try_from(id).map_err(|_| ProtocolError::ImpossibleEvent(id))?;
        Ok(Self {
            seq,
            vcpu: common.vcpu,
            arch: common.arch,
            kind: VcpuEventKind::decode(id, data)?,
        })
    }
}

#[cfg(test)]
mod tests;
