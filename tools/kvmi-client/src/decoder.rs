// SPDX-License-Identifier: GPL-2.0 OR MIT

//! From bytes to messages, without a socket.

use kvmi_abi::wire::{ErrorCode, Header};
use kvmi_abi::KvmiError;
use zerocopy::FromBytes as _;

use crate::error::ProtocolError;

/// A message as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows the header, `header.size` bytes.
    pub payload: Vec<u8>,
}

impl Message {
    /// Takes the message for a reply: what the host says about the command, and the data that
    /// follows if it succeeded.
    pub fn reply(&self) -> Result<Result<&[u8], KvmiError>, ProtocolError> {
        let size = ProtocolError::Size {
            got: self.payload.len(),
            wanted: size_of::<ErrorCode>(),
        };
        let (code, data) = ErrorCode::read_from_prefix(&self.payload).map_err(|_| size)?;
        if code.err == 0 {
            return Ok(Ok(data));
        }
        code.err
            .checked_neg()
            .and_then(KvmiError::from_code)
            .map(Err)
            .ok_or(ProtocolError::UnknownError(code.err))
    }
}

/// Cuts a stream of bytes into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of the buffer that have been taken.
    taken: usize,
}

impl Decoder {
    /// Takes more bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether bytes of an incomplete message are there.
    pub fn is_inside_message(&self) -> bool {
        self.taken < self.buffer.len()
    }

    /// Takes the next message, if all of it is there. After an error the stream makes no sense any
    /// more, and the error stays.
    pub fn next_message(&mut self) -> Result<Option<Message>, ProtocolError> {
        let left = self.buffer.get(self.taken..).unwrap_or_default();
        let Ok((header, rest)) = Header::read_from_prefix(left) else {
            return Ok(None);
        };
        let len = header
            .payload_len()
            .ok_or(ProtocolError::Oversized(header.size))?;
        let Some(payload) = rest.get(..len) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.taken += size_of::<Header>() + len;
        Ok(Some(Message { header, payload }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmi_abi::wire::ReplyHead;

    const REQUEST: Header = Header {
        id: 8,
        size: 0,
        seq: 7,
    };

    fn decode(bytes: &[u8]) -> Result<Option<Message>, ProtocolError> {
        let mut decoder = Decoder::default();
        decoder.feed(bytes);
        decoder.next_message()
    }

    #[test]
    fn messages_are_cut_at_any_place() {
        let mut stream = ReplyHead::failure(&REQUEST, KvmiError::Perm)
            .as_bytes()
            .to_vec();
        stream.extend(ReplyHead::success(&REQUEST, 2).unwrap().as_bytes());
        stream.extend([1, 2]);

        let mut decoder = Decoder::default();
        let mut messages = Vec::new();
        for byte in &stream {
            decoder.feed(&[*byte]);
            messages.extend(decoder.next_message().unwrap());
        }
        assert!(!decoder.is_inside_message());
        let replies: Vec<_> = messages.iter().map(|m| m.reply().unwrap()).collect();
        assert_eq!(replies, [Err(KvmiError::Perm), Ok(&[1, 2][..])]);
        assert!(messages.iter().all(|m| m.header.seq == 7));
    }

    #[test]
    fn oversized_message_is_an_error_as_soon_as_its_header_is_there() {
        let mut header = [0; 8];
        header[2..4].copy_from_slice(&8184u16.to_ne_bytes());
        assert_eq!(decode(&header), Ok(None));
        header[2..4].copy_from_slice(&8185u16.to_ne_bytes());
        assert_eq!(decode(&header), Err(ProtocolError::Oversized(8185)));
    }

    #[test]
    fn reply_must_have_a_known_error() {
        let reply = |err: i32| Message {
            header: REQUEST,
            payload: ErrorCode { err, padding: 0 }.as_bytes().to_vec(),
        };
        use zerocopy::IntoBytes as _;
        assert_eq!(reply(-1000).reply(), Ok(Err(KvmiError::NoSys)));
        for err in [1, 1000, -3, i32::MIN, i32::MAX] {
            assert_eq!(reply(err).reply(), Err(ProtocolError::UnknownError(err)));
        }
        let short = Message {
            header: REQUEST,
            payload: vec![0; 7],
        };
        assert_eq!(
            short.reply(),
            Err(ProtocolError::Size { got: 7, wanted: 8 })
        );
    }
}
