// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What [`super::VcpuRequest::parse`] and its relatives accept and refuse.

use zerocopy::IntoBytes as _;

use super::*;
use crate::{
    ioctl::Feature,
    policy::MaskChange, //
};

fn all_events() -> Policy {
    let mut policy = Policy::default();
    policy.change_events(MaskChange::of_events(&Feature { allow: 1, id: -1 }).unwrap());
    policy
}

fn parse(command: Command, payload: &[u8]) -> Result<VcpuRequest<'_>, KvmiError> {
    VcpuRequest::parse(command, payload, &all_events())
}

#[test]
fn every_padding_byte_is_checked() {
    let inject = [14, 0, 0, 0, 2, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let cases: [(Command, &[u8], &[usize]); 4] = [
        (
            Command::VcpuControlEvents,
            &[1, 0, 1, 0, 0, 0, 0, 0],
            &[3, 4, 5, 6, 7],
        ),
        (Command::VcpuGetRegisters, &[0; 8], &[2, 3, 4, 5, 6, 7]),
        (Command::VcpuInjectException, &inject, &[1, 2, 3]),
        (Command::VcpuGetXcr, &[0; 8], &[0, 1, 2, 3, 4, 5, 6, 7]),
    ];
    for (command, good, padding) in cases {
        assert!(parse(command, good).is_ok(), "{command:?}");
        for at in padding {
            let mut bad = good.to_vec();
            bad[*at] = 1;
            assert_eq!(
                parse(command, &bad),
                Err(KvmiError::Inval),
                "{command:?} byte {at}"
            );
        }
    }
}

#[test]
fn padding_of_the_vcpu_header_is_checked() {
    for at in 2..8 {
        let mut payload = [0; 8];
        payload[at] = 1;
        let message = VcpuMessage::parse(Command::VcpuGetInfo, &payload);
        assert_eq!(message, Err(KvmiError::Inval), "byte {at}");
    }
    let message = VcpuMessage::parse(Command::VcpuGetInfo, &[3, 1, 0, 0, 0, 0, 0, 0, 9]).unwrap();
    assert_eq!((message.vcpu, message.payload), (0x103, &[9][..]));
}

#[test]
fn msr_list_must_be_there_and_fit_the_reply() {
    let list = |nmsrs: u16, indices: usize| {
        let mut payload = vec![0; 8 + 4 * indices];
        payload[..2].copy_from_slice(&nmsrs.to_ne_bytes());
        parse(Command::VcpuGetRegisters, &payload).map(|request| match request {
            VcpuRequest::GetRegisters(msrs) => msrs.len(),
            _ => unreachable!(),
        })
    };
    assert_eq!(list(0, 0), Ok(0));
    assert_eq!(list(2, 2), Ok(2));
    assert_eq!(list(2, 3), Ok(2));
    assert_eq!(list(2, 1), Err(KvmiError::Inval));
    assert_eq!(list(481, 481), Ok(481));
    assert_eq!(list(482, 482), Err(KvmiError::Inval));
    assert_eq!(list(u16::MAX, 482), Err(KvmiError::Inval));

    let request = [1, 0, 0, 0, 0, 0, 0, 0, 0x82, 0, 0, 0xc0];
    let Ok(VcpuRequest::GetRegisters(msrs)) = parse(Command::VcpuGetRegisters, &request) else {
        panic!("refused");
    };
    assert!(msrs.indices().eq([0xc000_0082]));
}

#[test]
fn state_to_set_must_be_complete() {
    let regs = [0; 144];
    assert!(parse(Command::VcpuSetRegisters, &regs).is_ok());
    assert_eq!(
        parse(Command::VcpuSetRegisters, &regs[..143]),
        Err(KvmiError::Inval)
    );
    let xsave = [0; XSAVE_SIZE + 1];
    assert_eq!(
        parse(Command::VcpuSetXsave, &xsave),
        Ok(VcpuRequest::SetXsave(&xsave[..XSAVE_SIZE]))
    );
    assert_eq!(
        parse(Command::VcpuSetXsave, &xsave[..XSAVE_SIZE - 1]),
        Err(KvmiError::Inval)
    );
}

#[test]
fn injecting_needs_the_trap_event() {
    let refused = VcpuRequest::parse(
        Command::VcpuInjectException,
        &[0xff; 16],
        &Policy::default(),
    );
    assert_eq!(refused, Err(KvmiError::Perm));
}

fn answer(event: u8, action: u8) -> EventReply {
    EventReply {
        event,
        action,
        ..Default::default()
    }
}

#[test]
fn answer_must_be_of_exact_size_with_zero_padding() {
    let good = answer(1, 0);
    let bytes = good.as_bytes();
    assert!(EventAnswer::parse(bytes).is_ok());
    for len in 0..bytes.len() {
        assert!(EventAnswer::parse(&bytes[..len]).is_err(), "{len} bytes");
    }
    let mut long = bytes.to_vec();
    long.push(0);
    assert!(EventAnswer::parse(&long).is_err());
    for at in (2..8).chain(10..16) {
        let mut bad = bytes.to_vec();
        bad[at] = 1;
        assert!(EventAnswer::parse(&bad).is_err(), "byte {at}");
    }
}

#[test]
fn only_what_interrupts_an_instruction_can_be_retried() {
    for event in [1, 9] {
        for action in 0..=u8::MAX {
            let answered = EventAnswer::parse(answer(event, action).as_bytes());
            assert_eq!(answered.is_ok(), action == 0 || action == 2);
        }
    }
    for action in 0..=u8::MAX {
        let answered = EventAnswer::parse(answer(17, action).as_bytes());
        assert_eq!(answered.is_ok(), action <= 2, "PF, action {action}");
    }
    for event in [0, 2, 3, 5, 0xff] {
        assert!(EventAnswer::parse(answer(event, 0).as_bytes()).is_err());
    }
}
