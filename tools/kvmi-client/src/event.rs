// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Events, decoded.

use kvmi_abi::{
    access::{PfEvent, GVA_UNKNOWN},
    arch::VcpuEventArch,
    event::{EventHeader, VcpuEvent as Common},
    id::{VCPU_EVENT, VM_EVENT},
    vcpu::TrapEvent,
    Event as EventId,
};

use crate::{access::Access, decoder::Message, error::ProtocolError};

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

/// What has happened on a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuEventKind {
    /// The vCPU was paused on request.
    Pause,
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
            Self::Trap { .. } => TRAP,
            Self::Pf { .. } => PF,
            Self::Unknown { id, .. } => *id,
        }
    }

    fn decode(id: u8, data: &[u8]) -> Result<Self, ProtocolError> {
        Ok(match id {
            PAUSE => Self::Pause,
            TRAP => {
                let (trap, _) = split::<TrapEvent>(data)?;
                Self::Trap {
                    nr: trap.nr,
                    error_code: trap.error_code,
                    address: trap.address,
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
            _ => Self::Unknown {
                id,
                data: data.to_vec(),
            },
        })
    }
}

// Ids of events are below 32, so nothing is lost.
const PAUSE: u8 = EventId::Pause.id() as u8;
const TRAP: u8 = EventId::Trap.id() as u8;
const PF: u8 = EventId::Pf.id() as u8;

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

    fn decoded(message: &Message) -> VcpuEvent {
        match Event::decode(message).unwrap() {
            Some(Event::Vcpu(event)) => *event,
            event => panic!("not a vCPU event: {event:?}"),
        }
    }

    #[test]
    fn data_of_a_vcpu_event_begins_where_its_size_says() {
        for (size, rest, data) in [
            (544, &[1, 2, 3][..], &[1, 2, 3][..]),
            (546, &[1, 2, 3], &[3]),
            (547, &[1, 2, 3], &[]),
        ] {
            let event = decoded(&vcpu_event(5, size, rest));
            assert_eq!((event.vcpu, event.seq), (2, 3));
            assert_eq!(event.arch.regs.rip, 0x1234);
            assert_eq!(event.kind.id(), 5);
            let data = data.to_vec();
            assert_eq!(event.kind, VcpuEventKind::Unknown { id: 5, data });
        }
    }

    #[test]
    fn known_events_have_their_fields() {
        let pause = decoded(&vcpu_event(1, 544, &[]));
        assert_eq!((pause.kind.id(), pause.kind), (1, VcpuEventKind::Pause));

        let trap = TrapEvent {
            nr: 14,
            error_code: 2,
            address: 0xdead_0000,
            ..Default::default()
        };
        // A newer host may tell more.
        let longer = [&[0xee; 8], trap.as_bytes(), &[0xff; 3]].concat();
        let event = decoded(&vcpu_event(9, 552, &longer));
        let expected = VcpuEventKind::Trap {
            nr: 14,
            error_code: 2,
            address: 0xdead_0000,
        };
        assert_eq!((event.kind.id(), event.kind), (9, expected));
        let cut = Event::decode(&vcpu_event(9, 544, &trap.as_bytes()[..15])).unwrap_err();
        let size = ProtocolError::Size {
            got: 15,
            wanted: 16,
        };
        assert_eq!(cut, size);
    }

    #[test]
    fn denied_access_has_one_address_or_two() {
        let pf = |gva, access| PfEvent {
            gva,
            gpa: 0x5008,
            access,
            ..Default::default()
        };
        for (gva, known) in [(0x1008, Some(0x1008)), (u64::MAX, None)] {
            let event = decoded(&vcpu_event(17, 544, pf(gva, 2).as_bytes()));
            let expected = VcpuEventKind::Pf {
                gva: known,
                gpa: 0x5008,
                access: Access::W,
            };
            assert_eq!((event.kind.id(), event.kind), (17, expected));
        }
        for access in [0, 8, 0xff] {
            let event = Event::decode(&vcpu_event(17, 544, pf(0, access).as_bytes()));
            let error = event.unwrap_err();
            assert_eq!(error, ProtocolError::ImpossibleAccess(access));
        }
        assert!(Event::decode(&vcpu_event(17, 544, &pf(0, 2).as_bytes()[..23])).is_err());
    }

    #[test]
    fn unknown_event_of_the_vm_is_kept() {
        let event = Event::decode(&message(VM_EVENT, &[2, 0, 0, 0, 0, 0, 0, 0, 7, 8])).unwrap();
        let Some(Event::Unknown { id, seq, data }) = event else {
            panic!("not unknown: {event:?}");
        };
        assert_eq!((id, seq, data), (2, 3, vec![7, 8]));
    }

    #[test]
    fn impossible_sizes_and_ids_are_errors() {
        for size in [0, 543, 548, u16::MAX] {
            let error = Event::decode(&vcpu_event(1, size, &[1, 2, 3])).unwrap_err();
            assert!(matches!(error, ProtocolError::Size { .. }), "{error}");
        }
        for (message, id) in [
            (vcpu_event(2, 544, &[]), 2),
            (vcpu_event(0, 544, &[]), 0),
            (vcpu_event(257, 544, &[]), 257),
            (message(VM_EVENT, &[1, 0, 0, 0, 0, 0, 0, 0]), 1),
        ] {
            let error = Event::decode(&message).unwrap_err();
            assert_eq!(error, ProtocolError::ImpossibleEvent(id));
        }
        assert!(Event::decode(&message(VM_EVENT, &[0; 7])).is_err());
        assert!(Event::decode(&message(VCPU_EVENT, &[1, 0, 0, 0, 0, 0, 0, 0])).is_err());
    }
}
