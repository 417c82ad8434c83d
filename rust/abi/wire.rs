// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Framing: the header of every message and the head of every reply.

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

use crate::error::KvmiError;

/// Protocol version, the answer to `GET_VERSION` and to `KVM_CAP_INTROSPECTION`.
pub const VERSION: u32 = 1;

/// Largest payload of a message in either direction, in bytes.
pub const MAX_MSG_SIZE: usize = 8192 - size_of::<Header>();

/// Head of every message (`kvmi_msg_hdr`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Header {
    /// Which command, or which kind of event message.
    pub id: u16,
    /// Bytes of payload that follow.
    pub size: u16,
    /// Echoed in the reply.
    pub seq: u32,
}

impl Header {
    /// Returns the payload's length in bytes, or `None` if it is more than a message may have.
    pub fn payload_len(&self) -> Option<usize> {
        let len = usize::from(self.size);
        (len <= MAX_MSG_SIZE).then_some(len)
    }
}

/// First part of every reply's payload (`kvmi_error_code`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ErrorCode {
    /// 0, or a negative `KVM_E*` number.
    pub err: i32,
    /// 0.
    pub padding: u32,
}

/// First part of every vCPU message's payload (`kvmi_vcpu_hdr`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VcpuHeader {
    /// Index of the vCPU in order of creation (not its APIC id).
    pub vcpu: u16,
    /// 0.
    pub padding1: u16,
    /// 0.
    pub padding2: u32,
}

/// Header and error code of a reply, ready to be sent ahead of the reply's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(C)]
pub struct ReplyHead {
    header: Header,
    error: ErrorCode,
}

impl ReplyHead {
    /// Builds the head of the successful reply to `request` with `data_len` bytes of data.
    ///
    /// Returns `None` if the reply would be larger than a message may be.
    pub fn success(request: &Header, data_len: usize) -> Option<Self> {
        let size = size_of::<ErrorCode>().checked_add(data_len)?;
        if size > MAX_MSG_SIZE {
            return None;
        }
        Some(Self::new(request, u16::try_from(size).ok()?, 0))
    }

    /// Builds the whole of the reply that tells `error` to the sender of `request`.
    pub fn failure(request: &Header, error: KvmiError) -> Self {
        const SIZE: u16 = 8;
        const _: () = assert!(size_of::<ErrorCode>() == SIZE as usize);
        Self::new(request, SIZE, -error.code())
    }

    fn new(request: &Header, size: u16, err: i32) -> Self {
        Self {
            header: Header { size, ..*request },
            error: ErrorCode { err, padding: 0 },
        }
    }

    /// The bytes that go on the wire.
    pub fn as_bytes(&self) -> &[u8] {
        zerocopy::IntoBytes::as_bytes(self)
    }
}

/// Copies the start of `payload` into a `T`, taking missing bytes as zero and ignoring surplus
/// ones, as the protocol wants it for commands without an array.
pub fn zero_extended<T>(payload: &[u8]) -> T
where
    T: Default + zerocopy::FromBytes + zerocopy::IntoBytes,
{
    let mut value = T::default();
    for (to, from) in value.as_mut_bytes().iter_mut().zip(payload) {
        *to = *from;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{CheckId, GuestRange};

    #[test]
    fn payload_of_the_largest_size_is_accepted_and_one_more_is_not() {
        let mut header = Header {
            size: 8184,
            ..Default::default()
        };
        assert_eq!(header.payload_len(), Some(8184));
        header.size = 8185;
        assert_eq!(header.payload_len(), None);
        header.size = u16::MAX;
        assert_eq!(header.payload_len(), None);
    }

    #[test]
    fn reply_carries_id_and_seq_of_its_request() {
        let request = Header {
            id: 12,
            size: 16,
            seq: 0xdead_beef,
        };
        let head = ReplyHead::success(&request, 4096).unwrap();
        assert_eq!(
            head.header,
            Header {
                size: 4104,
                ..request
            }
        );
        assert_eq!(head.error, ErrorCode::default());

        let head = ReplyHead::failure(&request, KvmiError::NoSys);
        assert_eq!(head.header, Header { size: 8, ..request });
        assert_eq!(head.error.err, -1000);
    }

    #[test]
    fn reply_larger_than_a_message_cannot_be_built() {
        let request = Header::default();
        assert!(ReplyHead::success(&request, MAX_MSG_SIZE - 8).is_some());
        assert!(ReplyHead::success(&request, MAX_MSG_SIZE - 7).is_none());
        assert!(ReplyHead::success(&request, usize::MAX).is_none());
    }

    #[test]
    fn short_command_is_extended_with_zeros_and_surplus_is_ignored() {
        let full: CheckId = zero_extended(&[4, 0, 0, 0, 0, 0, 0, 0, 0xff]);
        assert_eq!(full.id, 4);
        let short: GuestRange = zero_extended(&[0, 0x10]);
        assert_eq!(short.gpa, 0x1000);
        assert_eq!(short.size, 0);
        let empty: CheckId = zero_extended(&[]);
        assert_eq!(empty, CheckId::default());
    }
}
