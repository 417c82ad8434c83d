// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What [`Event::decode`] makes of messages.

use kvmi_abi::{
    access::PfEvent,
    guest_event::{
        BreakpointEvent, Cr, CrEvent, DescriptorEvent, DescriptorRegister, MsrEvent,
        SinglestepEvent, XsetbvEvent,
    },
    vcpu::TrapEvent,
    wire::Header,
};
use zerocopy::IntoBytes as _;

use super::*;
use crate::access::Access;

fn message(id: u16, payload: &[u8]) -> Message {
    let header = Header {
        id,
        size: payload.len().try_into().unwrap(),
        seq: 3,
    };
    Message {
        header,
        payload: payload.to_vec(),
    }
}

fn vcpu_event(event: u16, size: u16, rest: &[u8]) -> Message {
    let header = EventHeader {
        event,
        ..Default::default()
    };
    let mut common = Common {
        size,
        vcpu: 2,
        ..Default::default()
    };
    common.arch.regs.rip = 0x1234;
    message(
        VCPU_EVENT,
        &[header.as_bytes(), common.as_bytes(), rest].concat(),
    )
}

#[test]
fn unhook_and_replies_are_told_apart() {
    let unhook = Event::decode(&message(VM_EVENT, &[0; 8])).unwrap();
    assert!(matches!(unhook, Some(Event::Unhook { seq: 3 })));
    assert!(Event::decode(&message(8, &[0; 8])).unwrap().is_none());
}

fn decoded(message: &Message) -> VcpuEvent {
    match Event::decode(message).unwrap() {
        Some(Event::Vcpu(event)) => *event,
        event => panic!("not a vCPU event: {event:?}"),
    }
}

#[test]
fn data_of_a_vcpu_event_begins_where_its_size_says() {
    for (size, rest, data) in [
        (544, &[1, 2, 3][..], &[1, 2, 3][..]),
        (546, &[1, 2, 3], &[3]),
        (547, &[1, 2, 3], &[]),
    ] {
        let event = decoded(&vcpu_event(21, size, rest));
        assert_eq!((event.vcpu, event.seq), (2, 3));
        assert_eq!(event.arch.regs.rip, 0x1234);
        assert_eq!(event.kind.id(), 21);
        let data = data.to_vec();
        assert_eq!(event.kind, VcpuEventKind::Unknown { id: 21, data });
    }
}

#[test]
fn known_events_have_their_fields() {
    let pause = decoded(&vcpu_event(1, 544, &[]));
    assert_eq!((pause.kind.id(), pause.kind), (1, VcpuEventKind::Pause));

    let trap = TrapEvent {
        nr: 14,
        error_code: 2,
        address: 0xdead_0000,
        ..Default::default()
    };
    // A newer host may tell more.
    let longer = [&[0xee; 8], trap.as_bytes(), &[0xff; 3]].concat();
    let event = decoded(&vcpu_event(9, 552, &longer));
    let expected = VcpuEventKind::Trap {
        nr: 14,
        error_code: 2,
        address: 0xdead_0000,
    };
    assert_eq!((event.kind.id(), event.kind), (9, expected));
    let cut = Event::decode(&vcpu_event(9, 544, &trap.as_bytes()[..15])).unwrap_err();
    let size = ProtocolError::Size {
        got: 15,
        wanted: 16,
    };
    assert_eq!(cut, size);
}

#[test]
fn denied_access_has_one_address_or_two() {
    let pf = |gva, access| PfEvent {
        gva,
        gpa: 0x5008,
        access,
        ..Default::default()
    };
    for (gva, known) in [(0x1008, Some(0x1008)), (u64::MAX, None)] {
        let event = decoded(&vcpu_event(17, 544, pf(gva, 2).as_bytes()));
        let expected = VcpuEventKind::Pf {
            gva: known,
            gpa: 0x5008,
            access: Access::W,
        };
        assert_eq!((event.kind.id(), event.kind), (17, expected));
    }
    for access in [0, 8, 0xff] {
        let event = Event::decode(&vcpu_event(17, 544, pf(0, access).as_bytes()));
        let error = event.unwrap_err();
        assert_eq!(error, ProtocolError::ImpossibleAccess(access));
    }
    assert!(Event::decode(&vcpu_event(17, 544, &pf(0, 2).as_bytes()[..23])).is_err());
}

#[test]
fn unknown_event_of_the_vm_is_kept() {
    let event = Event::decode(&message(VM_EVENT, &[2, 0, 0, 0, 0, 0, 0, 0, 7, 8])).unwrap();
    let Some(Event::Unknown { id, seq, data }) = event else {
        panic!("not unknown: {event:?}");
    };
    assert_eq!((id, seq, data), (2, 3, vec![7, 8]));
}

#[test]
fn impossible_sizes_and_ids_are_errors() {
    for size in [0, 543, 548, u16::MAX] {
        let error = Event::decode(&vcpu_event(1, size, &[1, 2, 3])).unwrap_err();
        assert!(matches!(error, ProtocolError::Size { .. }), "{error}");
    }
    for (message, id) in [
        (vcpu_event(2, 544, &[]), 2),
        (vcpu_event(0, 544, &[]), 0),
        (vcpu_event(257, 544, &[]), 257),
        (message(VM_EVENT, &[1, 0, 0, 0, 0, 0, 0, 0]), 1),
    ] {
        let error = Event::decode(&message).unwrap_err();
        assert_eq!(error, ProtocolError::ImpossibleEvent(id));
    }
    assert!(Event::decode(&message(VM_EVENT, &[0; 7])).is_err());
    assert!(Event::decode(&message(VCPU_EVENT, &[1, 0, 0, 0, 0, 0, 0, 0])).is_err());
}

/// The event `id` with `data`, which must not be accepted if it is cut.
fn specific(id: u16, data: &[u8]) -> VcpuEventKind {
    if let Some((_, cut)) = data.split_last() {
        let error = Event::decode(&vcpu_event(id, 544, cut)).unwrap_err();
        assert!(matches!(error, ProtocolError::Size { .. }), "{error}");
    }
    let event = decoded(&vcpu_event(id, 544, data));
    assert_eq!(u16::from(event.kind.id()), id);
    event.kind
}

#[test]
fn writes_to_registers_have_both_values() {
    let cr = CrEvent {
        cr: 4,
        old_value: 1,
        new_value: 2,
        ..Default::default()
    };
    let kind = specific(7, cr.as_bytes());
    assert_eq!(kind.new_value(), Some(2));
    let (old, new) = (1, 2);
    let expected = VcpuEventKind::Cr {
        cr: Cr::Cr4,
        old,
        new,
    };
    assert_eq!(kind, expected);

    let msr = MsrEvent {
        msr: 0xc000_0082,
        old_value: 1,
        new_value: 2,
        ..Default::default()
    };
    let kind = specific(15, msr.as_bytes());
    assert_eq!(kind.new_value(), Some(2));
    let msr = 0xc000_0082;
    assert_eq!(kind, VcpuEventKind::Msr { msr, old, new });

    let xsetbv = XsetbvEvent {
        old_value: 1,
        new_value: 2,
        ..Default::default()
    };
    let kind = specific(11, xsetbv.as_bytes());
    // The reply says nothing about it.
    assert_eq!(kind.new_value(), None);
    assert_eq!(kind, VcpuEventKind::Xsetbv { xcr: 0, old, new });
}

#[test]
fn instructions_are_told_with_what_they_do() {
    assert_eq!(specific(3, &[]), VcpuEventKind::Hypercall);
    for (gpa, known) in [(0x5008, Some(0x5008)), (u64::MAX, None)] {
        let breakpoint = BreakpointEvent {
            gpa,
            insn_len: 2,
            ..Default::default()
        };
        let expected = VcpuEventKind::Breakpoint {
            gpa: known,
            insn_len: 2,
        };
        assert_eq!(specific(5, breakpoint.as_bytes()), expected);
    }
    for write in [false, true] {
        let access = DescriptorEvent {
            descriptor: 2,
            write: write.into(),
            ..Default::default()
        };
        let register = DescriptorRegister::Gdtr;
        let expected = VcpuEventKind::Descriptor { register, write };
        assert_eq!(specific(13, access.as_bytes()), expected);
    }
    for failed in [false, true] {
        let step = SinglestepEvent {
            failed: failed.into(),
            ..Default::default()
        };
        let expected = VcpuEventKind::Singlestep { failed };
        assert_eq!(specific(19, step.as_bytes()), expected);
    }
}

#[test]
fn registers_that_do_not_exist_are_errors() {
    for (event, size, register) in [(7, 24, 8), (13, 8, 0), (13, 8, 5)] {
        let mut data = vec![0; size];
        data[0] = register;
        let error = Event::decode(&vcpu_event(event.into(), 544, &data)).unwrap_err();
        let expected = ProtocolError::ImpossibleRegister { event, register };
        assert_eq!(error, expected);
    }
}
