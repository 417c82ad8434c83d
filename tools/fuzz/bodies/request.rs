// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a host does with a stream of bytes from a tool.

use kvmi_abi::{ioctl::Feature, policy::MaskChange, wire::Header, Policy, Reject, Request};
use zerocopy::FromBytes as _;

/// The largest part of a request that is memory, in bytes.
const PAGE: usize = 4096;

/// Parses messages until one ends the connection, and checks that what is accepted is safe to do.
pub fn run(mut stream: &[u8]) {
    let policy = policy(stream.first().copied().unwrap_or_default());
    while let Ok((header, rest)) = Header::read_from_prefix(stream) {
        let Some(payload) = header.payload_len().and_then(|len| rest.get(..len)) else {
            return;
        };
        match Request::parse(&header, payload, &policy) {
            Ok(Request::ReadPhysical { gpa, len }) => check_range(gpa, len),
            Ok(Request::WritePhysical { gpa, data }) => check_range(gpa, data.len()),
            Ok(_) | Err(Reject::Reply(_)) => {}
            Err(Reject::Close(_)) => return,
        }
        stream = &rest[payload.len()..];
    }
}

/// A policy that allows all or next to nothing.
fn policy(seed: u8) -> Policy {
    let mut policy = Policy::default();
    let all = Feature { allow: 1, id: -1 };
    if seed % 8 != 0 {
        if let Ok(change) = MaskChange::of_commands(&all) {
            assert_eq!(policy.change_commands(change), Ok(()));
        }
        if let Ok(change) = MaskChange::of_events(&all) {
            policy.change_events(change);
        }
    }
    policy
}

fn check_range(gpa: u64, len: usize) {
    assert!((1..=PAGE).contains(&len));
    assert!(gpa % PAGE as u64 + len as u64 <= PAGE as u64);
}
