// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What [`super::Request::parse`] accepts and refuses.

use zerocopy::IntoBytes as _;

use super::*;
use crate::{ioctl::Feature, policy::MaskChange};

const INVAL: Reject = Reject::Reply(KvmiError::Inval);
const TRUNCATED: Reject = Reject::Close(CloseReason::Truncated);

fn all_allowed() -> Policy {
    let all = Feature { allow: 1, id: -1 };
    let mut policy = Policy::default();
    policy
        .change_commands(MaskChange::of_commands(&all).unwrap())
        .unwrap();
    policy.change_events(MaskChange::of_events(&all).unwrap());
    policy
}

fn parse(id: u16, payload: &[u8]) -> Result<Request<'_>, Reject> {
    let header = Header {
        id,
        size: payload.len().try_into().unwrap(),
        seq: 1,
    };
    Request::parse(&header, payload, &all_allowed())
}

#[test]
fn unknown_or_unserved_ids_are_answered_with_enosys() {
    for id in (0..=u16::MAX).filter(|id| *id != VCPU_EVENT) {
        let served = Command::from_id(id).is_some_and(Command::is_served);
        let enosys = parse(id, &[]) == Err(Reject::Reply(KvmiError::NoSys));
        assert_eq!(enosys, !served, "id {id}");
    }
}

#[test]
fn malformed_event_reply_closes_the_connection() {
    let close = Err(Reject::Close(CloseReason::MalformedEventReply));
    assert_eq!(parse(VCPU_EVENT, &[0; 16]), close);
    assert_eq!(parse(VCPU_EVENT, &[]), close);
}

#[test]
fn pause_checks_its_arguments_before_the_policy() {
    let pause = Command::VmPauseVcpu.id();
    let request = Request::PauseVcpu {
        vcpu: 3,
        wait: true,
    };
    assert_eq!(parse(pause, &[3, 0, 1]), Ok(request));
    assert_eq!(parse(pause, &[3, 0, 2]), Err(INVAL));
    for at in 3..8 {
        let mut bad = [0; 8];
        bad[at] = 1;
        assert_eq!(parse(pause, &bad), Err(INVAL), "byte {at}");
    }
    let header = Header {
        id: pause,
        ..Default::default()
    };
    let mut policy = all_allowed();
    policy.change_events(MaskChange::of_events(&Feature { allow: 0, id: 1 }).unwrap());
    let result = |payload| Request::parse(&header, payload, &policy);
    assert_eq!(result(&[0, 0, 2]), Err(INVAL));
    assert_eq!(result(&[0, 0, 1]), Err(Reject::Reply(KvmiError::Perm)));
}

#[test]
fn disallowed_command_is_refused_before_its_arguments_are_looked_at() {
    let header = Header {
        id: Command::VmReadPhysical.id(),
        ..Default::default()
    };
    let refused = Err(Reject::Reply(KvmiError::Perm));
    assert_eq!(
        Request::parse(&header, &[0xff; 16], &Policy::default()),
        refused
    );
}

#[test]
fn every_padding_byte_is_checked() {
    // Commands with a valid request; the bytes of it that must be zero.
    let read = GuestRange {
        gpa: 0x1000,
        size: 8,
        ..Default::default()
    };
    let mut write = read.as_bytes().to_vec();
    write.extend([0xaa; 8]);
    let cases: [(Command, Vec<u8>, core::ops::Range<usize>); 6] = [
        (Command::VmCheckCommand, vec![2, 0, 0, 0, 0, 0, 0, 0], 2..8),
        (Command::VmCheckEvent, vec![0; 8], 2..8),
        (Command::VmControlEvents, vec![0, 0, 1, 0, 0, 0, 0, 0], 3..8),
        (Command::VmReadPhysical, read.as_bytes().to_vec(), 10..16),
        (Command::VmWritePhysical, write, 10..16),
        (
            Command::VmControlCleanup,
            vec![1, 0, 0, 0, 0, 0, 0, 0],
            1..8,
        ),
    ];
    for (command, good, padding) in cases {
        assert!(parse(command.id(), &good).is_ok(), "{command:?}");
        for at in padding {
            let mut bad = good.clone();
            bad[at] = 1;
            assert_eq!(
                parse(command.id(), &bad),
                Err(INVAL),
                "{command:?} byte {at}"
            );
        }
    }
}

#[test]
fn flags_other_than_zero_and_one_are_invalid() {
    for flag in 2..=u8::MAX {
        assert_eq!(parse(Command::VmControlCleanup.id(), &[flag]), Err(INVAL));
        assert_eq!(
            parse(Command::VmControlEvents.id(), &[0, 0, flag]),
            Err(INVAL)
        );
    }
}

#[test]
fn only_vm_events_can_be_controlled_for_the_vm() {
    let control = Command::VmControlEvents.id();
    let unhook = Request::ControlEvents {
        event: Event::Unhook,
        enable: true,
    };
    assert_eq!(parse(control, &[0, 0, 1]), Ok(unhook));
    for id in 1..=u8::MAX {
        assert_eq!(parse(control, &[id, 0, 1]), Err(INVAL), "event {id}");
    }
    let header = Header {
        id: control,
        ..Default::default()
    };
    let mut policy = all_allowed();
    policy.change_events(MaskChange::of_events(&Feature { allow: 0, id: 0 }).unwrap());
    let refused = Err(Reject::Reply(KvmiError::Perm));
    assert_eq!(Request::parse(&header, &[0, 0, 1], &policy), refused);
}

#[test]
fn write_ends_the_connection_if_its_data_is_cut_off() {
    let write = Command::VmWritePhysical.id();
    let mut message = GuestRange {
        gpa: 0,
        size: 4,
        ..Default::default()
    }
    .as_bytes()
    .to_vec();
    message.extend([1, 2, 3, 4]);
    let whole = Request::WritePhysical {
        gpa: 0,
        data: &[1, 2, 3, 4],
    };
    assert_eq!(parse(write, &message), Ok(whole));
    for len in 0..message.len() {
        assert_eq!(parse(write, &message[..len]), Err(TRUNCATED), "{len} bytes");
    }
    message.push(5);
    assert_eq!(parse(write, &message), Ok(whole));
}

#[test]
fn write_of_more_than_a_page_is_invalid() {
    let range = GuestRange {
        gpa: 0,
        size: 4097,
        ..Default::default()
    };
    let mut message = range.as_bytes().to_vec();
    message.resize(16 + 4097, 0);
    assert_eq!(parse(Command::VmWritePhysical.id(), &message), Err(INVAL));
}
