// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a host does with a stream of bytes from a tool.

use kvmi_abi::{
    guest_control::is_controllable_msr, ioctl::Feature, policy::MaskChange,
    vcpu_request::VcpuMessage, wire::Header, Policy, Reject, Request, VcpuRequest,
};
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
            Ok(Request::Vcpu(message)) => check_vcpu_request(&message, &policy),
            Ok(Request::EventReply(answer)) => {
                let wanted = answer.event.has_new_value();
                assert_eq!(answer.new_value.is_some(), wanted);
            }
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

fn check_vcpu_request(message: &VcpuMessage<'_>, policy: &Policy) {
    match VcpuRequest::parse(message.command, message.payload, policy) {
        Ok(VcpuRequest::ControlMsr { msr, .. }) => assert!(is_controllable_msr(msr)),
        Ok(VcpuRequest::GetRegisters(msrs)) => assert_eq!(msrs.indices().count(), msrs.len()),
        Ok(_) | Err(_) => {}
    }
}

fn check_range(gpa: u64, len: usize) {
    assert!((1..=PAGE).contains(&len));
    assert!(gpa % PAGE as u64 + len as u64 <= PAGE as u64);
}
