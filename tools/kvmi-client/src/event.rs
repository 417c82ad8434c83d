// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Events, decoded.

use kvmi_abi::{
    arch::VcpuEventArch,
    event::{EventHeader, VcpuEvent as Common},
    id::{VCPU_EVENT, VM_EVENT},
    Event as EventId, Scope,
};

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
}

/// An event of a vCPU.
#[derive(Clone, Debug)]
pub struct VcpuEvent {
    /// Which event.
    pub id: EventId,
    /// Number of the event in its session; the reply has to carry it.
    pub seq: u32,
    /// Index of the vCPU.
    pub vcpu: u16,
    /// State of the vCPU.
    pub arch: VcpuEventArch,
    /// What is specific to the event.
    pub data: Vec<u8>,
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
        let scope = match message.header.id {
            VM_EVENT => Scope::Vm,
            VCPU_EVENT => Scope::Vcpu,
            _ => return Ok(None),
        };
        let seq = message.header.seq;
        let (header, rest) = split::<EventHeader>(&message.payload)?;
        let id = EventId::from_id(header.event)
            .filter(|id| id.scope() == scope)
            .ok_or(ProtocolError::UnknownEvent(header.event))?;
        if id == EventId::Unhook {
            return Ok(Some(Self::Unhook { seq }));
        }

        let (common, _) = split::<Common>(rest)?;
        // The structure may have grown: what is specific to the event begins where it says.
        let size = usize::from(common.size);
        let too_small = size < size_of::<Common>();
        let data = rest
            .get(size..)
            .filter(|_| !too_small)
            .ok_or(ProtocolError::Size {
                got: rest.len().min(size),
                wanted: size.max(size_of::<Common>()),
            })?;
        Ok(Some(Self::Vcpu(Box::new(VcpuEvent {
            id,
            seq,
            vcpu: common.vcpu,
            arch: common.arch,
            data: data.to_vec(),
        }))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmi_abi::wire::Header;
    use zerocopy::IntoBytes as _;

    fn message(id: u16, payload: &[u8]) -> Message {
        let header = Header {
            id,
            size: payload.len().try_into().unwrap(),
            seq: 3,
        };
        Message {
            header,
            payload: payload.to_vec(),
        }
    }

    fn vcpu_event(event: u16, size: u16, rest: &[u8]) -> Message {
        let header = EventHeader {
            event,
            ..Default::default()
        };
        let mut common = Common {
            size,
            vcpu: 2,
            ..Default::default()
        };
        common.arch.regs.rip = 0x1234;
        message(
            VCPU_EVENT,
            &[header.as_bytes(), common.as_bytes(), rest].concat(),
        )
    }

    #[test]
    fn unhook_and_replies_are_told_apart() {
        let unhook = Event::decode(&message(VM_EVENT, &[0; 8])).unwrap();
        assert!(matches!(unhook, Some(Event::Unhook { seq: 3 })));
        assert!(Event::decode(&message(8, &[0; 8])).unwrap().is_none());
    }

    #[test]
    fn data_of_a_vcpu_event_begins_where_its_size_says() {
        for (size, rest, data) in [
            (544, &[1, 2, 3][..], &[1, 2, 3][..]),
            (546, &[1, 2, 3], &[3]),
            (547, &[1, 2, 3], &[]),
        ] {
            let event = Event::decode(&vcpu_event(1, size, rest)).unwrap();
            let Some(Event::Vcpu(event)) = event else {
                panic!("not a vCPU event: {event:?}");
            };
            assert_eq!((event.id, event.vcpu, event.seq), (EventId::Pause, 2, 3));
            assert_eq!(event.arch.regs.rip, 0x1234);
            assert_eq!(event.data, data);
        }
    }

    #[test]
    fn impossible_sizes_and_unknown_events_are_errors() {
        for size in [0, 543, 548, u16::MAX] {
            let error = Event::decode(&vcpu_event(1, size, &[1, 2, 3])).unwrap_err();
            assert!(matches!(error, ProtocolError::Size { .. }), "{error}");
        }
        for (message, id) in [
            (vcpu_event(2, 544, &[]), 2),
            (vcpu_event(0, 544, &[]), 0),
            (message(VM_EVENT, &[1, 0, 0, 0, 0, 0, 0, 0]), 1),
        ] {
            let error = Event::decode(&message).unwrap_err();
            assert_eq!(error, ProtocolError::UnknownEvent(id));
        }
        assert!(Event::decode(&message(VM_EVENT, &[0; 7])).is_err());
        assert!(Event::decode(&message(VCPU_EVENT, &[1, 0, 0, 0, 0, 0, 0, 0])).is_err());
    }
}
