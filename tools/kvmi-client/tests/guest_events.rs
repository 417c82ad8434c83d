// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Events of what the guest does by itself, against a host that follows a script.

mod common;

use std::{os::unix::net::UnixStream, time::Duration};

use common::{with_host, Host};
use kvmi_client::{
    abi::guest_event::{BreakpointEvent, Cr, CrEvent, MsrEvent, SinglestepEvent},
    Action, Command, Connection, Error, Event, KvmiError, VcpuEvent, VcpuEventKind,
};
use zerocopy::IntoBytes as _;

const LONG: Option<Duration> = Some(Duration::from_secs(5));

fn next(vm: &mut Connection<UnixStream>) -> VcpuEvent {
    match vm.next_event(LONG).unwrap() {
        Event::Vcpu(event) => *event,
        event => panic!("not an event of a vCPU: {event:?}"),
    }
}

#[test]
fn requests_are_laid_out_as_the_protocol_says() {
    let expected: [(Command, [u8; 8]); 6] = [
        (Command::VcpuControlCr, [3, 1, 0, 0, 0, 0, 0, 0]),
        (Command::VcpuControlCr, [0, 0, 0, 0, 0, 0, 0, 0]),
        (Command::VcpuControlMsr, [1, 0, 0, 0, 0x82, 0, 0, 0xc0]),
        (Command::VcpuControlMsr, [0, 0, 0, 0, 0x74, 1, 0, 0]),
        (Command::VcpuControlSinglestep, [1, 0, 0, 0, 0, 0, 0, 0]),
        (Command::VcpuControlSinglestep, [0, 0, 0, 0, 0, 0, 0, 0]),
    ];
    let host = |mut host: Host| {
        for (command, wanted) in expected {
            let (header, payload) = host.receive_for(0x0102, command);
            assert_eq!(payload, wanted, "{command:?}");
            host.succeed(&header, &[]);
        }
        let (header, _) = host.receive_for(0, Command::VcpuControlSinglestep);
        host.fail(&header, KvmiError::OpNotSupp);
    };
    with_host(host, |mut vm| {
        let vcpu = 0x0102;
        vm.control_cr(vcpu, Cr::Cr3, true).unwrap();
        vm.control_cr(vcpu, Cr::Cr0, false).unwrap();
        vm.control_msr(vcpu, 0xc000_0082, true).unwrap();
        vm.control_msr(vcpu, 0x174, false).unwrap();
        vm.control_singlestep(vcpu, true).unwrap();
        vm.control_singlestep(vcpu, false).unwrap();
        let error = vm.control_singlestep(0, true).unwrap_err();
        assert!(matches!(error, Error::Kvmi(KvmiError::OpNotSupp, _)));
    });
}

#[test]
fn register_gets_what_the_guest_writes_unless_the_tool_says_otherwise() {
    let cr = CrEvent {
        cr: 4,
        old_value: 0x20,
        new_value: 0x10_0020,
        ..Default::default()
    };
    let msr = MsrEvent {
        msr: 0xc000_0082,
        old_value: 5,
        new_value: u64::MAX,
        ..Default::default()
    };
    let host = |mut host: Host| {
        for (seq, action, value) in [
            (1, 0, 0x10_0020_u64),
            (2, 2, 0x10_0020),
            (3, 0, 0),
            (4, 0, 0x20),
        ] {
            host.vcpu_event(seq, 1, 7, cr.as_bytes());
            let (reply, data) = host.receive_reply_with_data(seq);
            assert_eq!((reply, &data[..]), ((1, 7, action), value.as_bytes()));
        }
        for (seq, value) in [(5, u64::MAX), (6, 5)] {
            host.vcpu_event(seq, 0, 15, msr.as_bytes());
            let (reply, data) = host.receive_reply_with_data(seq);
            assert_eq!((reply, &data[..]), ((0, 15, 0), value.as_bytes()));
        }
    };
    with_host(host, |mut vm| {
        let event = next(&mut vm);
        let expected = VcpuEventKind::Cr {
            cr: Cr::Cr4,
            old: 0x20,
            new: 0x10_0020,
        };
        assert_eq!(event.kind, expected);
        vm.reply_event(&event, Action::Continue).unwrap();
        let event = next(&mut vm);
        vm.reply_event(&event, Action::Crash).unwrap();
        for value in [0, 0x20] {
            let event = next(&mut vm);
            vm.reply_value(&event, value).unwrap();
        }
        let event = next(&mut vm);
        vm.reply_event(&event, Action::Continue).unwrap();
        let event = next(&mut vm);
        vm.reply_value(&event, 5).unwrap();
    });
}

#[test]
fn events_without_a_register_take_no_value() {
    let breakpoint = BreakpointEvent {
        gpa: 0x1000,
        insn_len: 1,
        ..Default::default()
    };
    let step = SinglestepEvent::default();
    let cases: [(u16, &[u8], Action); 5] = [
        (3, &[], Action::Continue),
        (5, breakpoint.as_bytes(), Action::Retry),
        (11, &[0; 24], Action::Continue),
        (13, &[1, 0, 0, 0, 0, 0, 0, 0], Action::Retry),
        (19, step.as_bytes(), Action::Continue),
    ];
    let host = |mut host: Host| {
        for (seq, (id, data, action)) in (1..).zip(cases) {
            host.vcpu_event(seq, 2, id, data);
            let id = u8::try_from(id).unwrap();
            assert_eq!(host.receive_reply(seq), (2, id, action.code()));
        }
    };
    with_host(host, |mut vm| {
        for (id, _, action) in cases {
            let event = next(&mut vm);
            assert_eq!(u16::from(event.kind.id()), id);
            let error = vm.reply_value(&event, 1).unwrap_err();
            assert!(matches!(error, Error::NoValue(e) if u16::from(e) == id));
            vm.reply_event(&event, action).unwrap();
        }
    });
}
