// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a tool does with a stream of bytes from a host.

use kvmi_client::{Decoder, Event};

/// Decodes messages until one makes no sense. The first byte says in how large pieces the stream
/// arrives, which must make no difference.
pub fn run(input: &[u8]) {
    let Some((piece, stream)) = input.split_first() else {
        return;
    };
    let whole = decode(stream.chunks(stream.len().max(1)));
    let pieces = decode(stream.chunks(usize::from(*piece).max(1)));
    assert_eq!(whole, pieces);
}

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<String> {
    let mut decoder = Decoder::default();
    let mut seen = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        loop {
            let message = match decoder.next_message() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(error) => {
                    seen.push(error.to_string());
                    return seen;
                }
            };
            assert_eq!(usize::from(message.header.size), message.payload.len());
            let event = Event::decode(&message);
            seen.push(format!("{message:?} {event:?} {:?}", message.reply()));
        }
    }
    seen
}
