// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Structures of events.

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

use crate::{
    arch::VcpuEventArch,
    id::{Event, VCPU_EVENT, VM_EVENT},
    wire::{
        Header,
        MAX_MSG_SIZE, //
    },
};

/// First part of every event's payload (`kvmi_event_hdr`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct EventHeader {
    /// Which event, see [`Event`].
    pub event: u16,
    /// 0.
    pub padding: [u16; 3],
}

/// Second part of a vCPU event's payload (`kvmi_vcpu_event`).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VcpuEvent {
    /// Size of this structure in bytes; what follows it is specific to the event.
    pub size: u16,
    /// Index of the vCPU.
    pub vcpu: u16,
    /// 0.
    pub padding: u32,
    /// State of the vCPU.
    pub arch: VcpuEventArch,
}

/// A whole event message of the VM: there is no specific part so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(C)]
pub struct VmEventMessage {
    header: Header,
    event: EventHeader,
}

impl VmEventMessage {
    /// Builds the message that tells `event` with the sequence number `seq`.
    pub fn new(event: Event, seq: u32) -> Self {
        const SIZE: u16 = 8;
        const _: () = assert!(size_of::<EventHeader>() == SIZE as usize);
        Self {
            header: Header {
                id: VM_EVENT,
                size: SIZE,
                seq,
            },
            event: EventHeader {
                event: event.id(),
                padding: [0; 3],
            },
        }
    }

    /// The bytes that go on the wire.
    pub fn as_bytes(&self) -> &[u8] {
        zerocopy::IntoBytes::as_bytes(self)
    }
}

/// Sequence numbers of one session's events: the first is 1.
#[derive(Debug, Default)]
pub struct EventSeq(u32);

impl EventSeq {
    /// Returns the number of the next event.
    pub fn next_number(&self) -> u32 {
        self.0.wrapping_add(1)
    }

    /// Counts an event as sent.
    pub fn advance(&mut self) {
        self.0 = self.next_number();
    }
}

/// Builds the header of a vCPU event with `body_len` bytes, or `None` if that is more than a
/// message may have.
pub fn vcpu_event_header(body_len: usize, seq: u32) -> Option<Header> {
    if body_len > MAX_MSG_SIZE {
        return None;
    }
    Some(Header {
        id: VCPU_EVENT,
        size: u16::try_from(body_len).ok()?,
        seq,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unhook_event_is_sixteen_bytes_and_numbered_from_one() {
        let mut seq = EventSeq::default();
        let message = VmEventMessage::new(Event::Unhook, seq.next_number());
        let mut expected = [0u8; 16];
        expected[2..4].copy_from_slice(&8u16.to_ne_bytes());
        expected[4..8].copy_from_slice(&1u32.to_ne_bytes());
        assert_eq!(message.as_bytes(), expected);
        assert_eq!(seq.next_number(), 1);
        seq.advance();
        assert_eq!(seq.next_number(), 2);
    }
}
