// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The handshake, both sides of it.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use kvmi_client::{abi::handshake::VmmHello, tool, vmm, Cookie, Error, ProtocolError, Result};
use zerocopy::IntoBytes as _;

const TIMEOUT: Duration = Duration::from_secs(5);

fn hello() -> VmmHello {
    VmmHello::new([7; 16], 1_700_000_000, b"guest", 0x1_0000_0000)
}

/// Lets a VMM and a tool shake hands.
fn shake(
    hello: &VmmHello,
    vmms: Option<&Cookie>,
    tools: Option<&Cookie>,
) -> (Result<()>, Result<VmmHello>) {
    let (a, b) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let vmm = scope.spawn(move || vmm::handshake(a, hello, vmms, TIMEOUT));
        let tool = tool::accept(b, tools, TIMEOUT);
        (vmm.join().unwrap(), tool)
    })
}

/// What a VMM says of the tool's answer; `None` is a wait that was too long.
fn answered(answer: &[u8]) -> Result<()> {
    let (a, mut b) = UnixStream::pair().unwrap();
    b.write_all(answer).unwrap();
    b.shutdown(std::net::Shutdown::Write).unwrap();
    vmm::handshake(a, &hello(), None, TIMEOUT)
}

/// What a tool makes of a VMM's part.
fn offered(bytes: &[u8]) -> Result<VmmHello> {
    let (a, mut b) = UnixStream::pair().unwrap();
    b.write_all(bytes).unwrap();
    b.shutdown(std::net::Shutdown::Write).unwrap();
    tool::accept(a, None, TIMEOUT)
}

fn resized(size: u32) -> Vec<u8> {
    let mut bytes = hello().as_bytes().to_vec();
    bytes.resize(size.try_into().unwrap(), 0xff);
    bytes[..4].copy_from_slice(&size.to_ne_bytes());
    bytes
}

#[test]
fn both_sides_understand_each_other() {
    let (vmm, tool) = shake(&hello(), None, None);
    vmm.unwrap();
    assert_eq!(tool.unwrap(), hello());
}

#[test]
fn older_vmm_does_not_tell_the_highest_address() {
    let mut short = hello();
    short.struct_size = 96;
    let (vmm, tool) = shake(&short, None, None);
    vmm.unwrap();
    let tool = tool.unwrap();
    assert_eq!((tool.name(), tool.max_gpa), (&b"guest"[..], 0));
}

#[test]
fn cookie_is_compared_if_the_vmm_has_one() {
    let (good, bad) = (Cookie::of_secret(b"good"), Cookie::of_secret(b"bad"));
    assert!(shake(&hello(), Some(&good), Some(&good)).0.is_ok());
    assert!(shake(&hello(), None, Some(&good)).0.is_ok());
    for tools in [Some(&bad), None] {
        let (vmm, _) = shake(&hello(), Some(&good), tools);
        assert!(matches!(vmm, Err(Error::Cookie)));
    }
}

#[test]
fn surplus_is_dropped_and_nothing_after_it_is_taken() {
    let (a, mut b) = UnixStream::pair().unwrap();
    b.write_all(&resized(300)).unwrap();
    b.write_all(b"next").unwrap();
    let offer = tool::accept(&a, None, TIMEOUT).unwrap();
    assert_eq!(offer.max_gpa, hello().max_gpa);
    let mut next = [0; 4];
    (&a).read_exact(&mut next).unwrap();
    assert_eq!(&next, b"next");

    let (mut a, b) = UnixStream::pair().unwrap();
    let mut answer = vec![0; 40];
    answer[..4].copy_from_slice(&40u32.to_ne_bytes());
    a.write_all(&answer).unwrap();
    a.write_all(b"next").unwrap();
    vmm::handshake(&b, &hello(), None, TIMEOUT).unwrap();
    (&b).read_exact(&mut next).unwrap();
    assert_eq!(&next, b"next");
}

#[test]
fn impossible_sizes_are_refused() {
    for size in [0, 31, 65537, u32::MAX] {
        let error = offered(&size.to_ne_bytes()).unwrap_err();
        let wanted = ProtocolError::HandshakeSize(size);
        assert!(matches!(error, Error::Protocol(e) if e == wanted));
    }
    for size in [0, 23, 65537, u32::MAX] {
        let error = answered(&size.to_ne_bytes()).unwrap_err();
        let wanted = ProtocolError::HandshakeSize(size);
        assert!(matches!(error, Error::Protocol(e) if e == wanted));
    }
    assert!(offered(&resized(32)).is_ok());
    assert!(offered(&resized(100)).is_ok());
}

#[test]
fn cut_handshake_is_an_error() {
    let whole = resized(104);
    for len in 0..whole.len() {
        assert!(matches!(offered(&whole[..len]), Err(Error::Closed)));
    }
    let mut answer = [0; 24];
    answer[..4].copy_from_slice(&24u32.to_ne_bytes());
    for len in 0..answer.len() {
        assert!(matches!(answered(&answer[..len]), Err(Error::Closed)));
    }
    assert!(answered(&answer).is_ok());
}

#[test]
fn silence_times_out() {
    let (a, _b) = UnixStream::pair().unwrap();
    let short = Duration::from_millis(30);
    assert!(matches!(tool::accept(&a, None, short), Err(Error::Timeout)));
    let vmm = vmm::handshake(&a, &hello(), None, short);
    assert!(matches!(vmm, Err(Error::Timeout)));
}
