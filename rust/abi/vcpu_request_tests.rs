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
    for event in Event::ALL.iter().filter(|e| e.scope() == Scope::Vcpu) {
        let id = u8::try_from(event.id()).unwrap();
        for action in 0..=u8::MAX {
            let mut bytes = answer(id, action).as_bytes().to_vec();
            bytes.resize(if event.has_new_value() { 24 } else { 16 }, 0);
            let fine = match action {
                0 | 2 => true,
                1 => matches!(id, 5 | 13 | 17),
                _ => false,
            };
            let decoded = EventAnswer::decode(&bytes);
            assert_eq!(decoded.is_some(), fine, "{event:?}, action {action}");
            let parsed = EventAnswer::parse(&bytes).is_ok();
            assert_eq!(parsed, fine && event.is_served(), "{event:?}");
        }
    }
    for event in [0, 2, 21, 0xff] {
        assert!(EventAnswer::parse(answer(event, 0).as_bytes()).is_err());
    }
}

#[test]
fn answer_says_which_value_a_register_gets_or_closes_the_connection() {
    for event in [Event::Cr, Event::Msr] {
        for action in [Action::Continue, Action::Crash] {
            let id = u8::try_from(event.id()).unwrap();
            let mut bytes = answer(id, action.code()).as_bytes().to_vec();
            bytes.extend([1, 2, 3, 4, 5, 6, 7, 8]);
            let expected = EventAnswer {
                vcpu: 0,
                event,
                action,
                new_value: Some(0x0807_0605_0403_0201),
            };
            assert_eq!(EventAnswer::decode(&bytes), Some(expected));
            for len in 0..24 {
                assert_eq!(EventAnswer::decode(&bytes[..len]), None, "{len} bytes");
            }
            bytes.push(0);
            assert_eq!(EventAnswer::decode(&bytes), None);
        }
    }
    let others = Event::ALL.iter().filter(|e| e.scope() == Scope::Vcpu);
    for event in others.filter(|e| !e.has_new_value()) {
        let id = u8::try_from(event.id()).unwrap();
        let mut bytes = answer(id, 0).as_bytes().to_vec();
        let decoded = EventAnswer::decode(&bytes).map(|answer| answer.new_value);
        assert_eq!(decoded, Some(None), "{event:?}");
        bytes.extend([0; 8]);
        assert_eq!(EventAnswer::decode(&bytes), None, "{event:?}");
    }
}
