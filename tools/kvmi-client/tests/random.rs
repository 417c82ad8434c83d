// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Random input from the other side: whatever it is, nothing panics and nothing hangs.

use std::{
    io::Write as _, net::Shutdown, ops::ControlFlow, os::unix::net::UnixStream, time::Duration,
};

use kvmi_client::{abi::wire::Header, tool, vmm, Connection, Error};
use proptest::{collection::vec, prelude::*};
use zerocopy::IntoBytes as _;

#[path = "../../fuzz/bodies/decoder.rs"]
mod decoder;
#[path = "../../fuzz/bodies/request.rs"]
mod request;

/// A stream of messages that look like real ones: random bytes alone hardly get anywhere.
fn messages() -> impl Strategy<Value = Vec<u8>> {
    let size = prop_oneof![
        4 => Just(None),
        1 => any::<u16>().prop_map(Some),
    ];
    let payload = prop_oneof![
        vec(any::<u8>(), 0..40),
        vec(0..3u8, 0..40),
        vec(prop_oneof![9 => Just(0u8), 1 => any::<u8>()], 540..600),
    ];
    let message = (0..32u16, size, 0..4u32, payload).prop_map(|(id, size, seq, payload)| {
        let header = Header {
            id,
            size: size.unwrap_or(payload.len() as u16),
            seq,
        };
        [header.as_bytes(), &payload].concat()
    });
    prop_oneof![
        1 => vec(any::<u8>(), 0..600),
        4 => vec(message, 0..12).prop_map(|messages| messages.concat()),
    ]
}

/// A socket from which `bytes` and then the end of the stream are received.
fn peer(bytes: &[u8]) -> (UnixStream, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(bytes).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    (ours, theirs)
}

const TIMEOUT: Duration = Duration::from_secs(5);

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..Default::default() })]

    #[test]
    fn host_takes_any_stream_of_a_tool(stream in messages()) {
        request::run(&stream);
    }

    #[test]
    fn tool_takes_any_stream_of_a_host(stream in messages()) {
        decoder::run(&stream);
    }

    #[test]
    fn connection_takes_any_stream_of_a_host(stream in messages()) {
        let (ours, _theirs) = peer(&stream);
        let mut vm = Connection::new(ours);
        let mut buffer = [0; 12];
        for _ in 0..4 {
            let _ = vm.get_version();
            let _ = vm.get_info();
            let _ = vm.check_command(2u16);
            let _ = vm.get_registers(0, &[1]);
            let _ = vm.get_xsave(1);
            let _ = vm.write_virtual(0, 4090, &[1; 8]);
            if let Err(error) = vm.read_physical(4090, &mut buffer) {
                prop_assert!(!matches!(error, Error::Timeout | Error::Io(_)), "{}", error);
            }
        }
        let _ = vm.pause_all(TIMEOUT).map(drop);
        let _ = vm.scan_physical(0, 20 * 4096, |_, _| ControlFlow::<()>::Continue(()));
        while vm.next_event(Some(TIMEOUT)).is_ok() {}
        let _ = vm.try_event();
    }

    #[test]
    fn handshake_takes_any_bytes(size in prop_oneof![0..200u32, any::<u32>()], rest in vec(any::<u8>(), 0..300)) {
        let bytes = [size.as_bytes(), &rest].concat();
        let (ours, _theirs) = peer(&bytes);
        let offer = tool::accept(&ours, None, TIMEOUT);
        prop_assert!(!matches!(offer, Err(Error::Timeout)));
        if let Ok(hello) = offer {
            let mut cut = hello;
            cut.struct_size = size;
            let (ours, _theirs) = peer(&rest);
            let _ = vmm::handshake(&ours, &cut, None, TIMEOUT);
        }
    }
}
