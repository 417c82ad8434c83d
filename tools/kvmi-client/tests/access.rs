// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page access against a host that follows a script.

mod common;

use std::time::Duration;

use common::{with_host, Host};
use kvmi_client::{
    abi::access::PfEvent, Access, Action, Command, Error, Event, KvmiError, VcpuEventKind,
};
use zerocopy::IntoBytes as _;

const LONG: Option<Duration> = Some(Duration::from_secs(5));

/// Receives SET_PAGE_ACCESS for some pages from `first` on.
fn receive(host: &mut Host, first: u64, count: u16) -> kvmi_client::abi::wire::Header {
    let (header, payload) = host.receive();
    assert_eq!(header.id, Command::VmSetPageAccess.id());
    let mut expected = [count.to_ne_bytes().as_slice(), &[0; 6]].concat();
    for page in first..first + u64::from(count) {
        expected.extend((page << 12).to_ne_bytes());
        expected.extend([5, 0, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(payload, expected, "from {first} on");
    header
}

/// Some pages that may be read and executed.
fn pages(count: u64) -> impl Iterator<Item = (u64, Access)> {
    (0..count).map(|page| (page << 12, Access::R | Access::X))
}

#[test]
fn pages_are_named_in_commands_of_511() {
    let host = |mut host: Host| {
        for (first, count) in [(0, 511), (511, 511), (1022, 1)] {
            let header = receive(&mut host, first, count);
            host.succeed(&header, &[]);
        }
        let header = receive(&mut host, 0, 511);
        host.succeed(&header, &[]);
        host.wait_for_end();
    };
    with_host(host, |mut vm| {
        vm.set_page_access(pages(1023)).unwrap();
        vm.set_page_access(pages(511)).unwrap();
        vm.set_page_access([]).unwrap();
    });
}

#[test]
fn all_pages_are_tried_and_the_first_refusal_is_told() {
    let host = |mut host: Host| {
        let header = receive(&mut host, 0, 511);
        host.succeed(&header, &[]);
        for (first, count, error) in [(511, 511, KvmiError::Inval), (1022, 7, KvmiError::NoMem)] {
            let header = receive(&mut host, first, count);
            host.fail(&header, error);
        }
        let (header, _) = host.receive();
        host.succeed(&header, &[0; 16]);
    };
    with_host(host, |mut vm| {
        let error = vm.set_page_access(pages(1029)).unwrap_err();
        assert!(matches!(
            error,
            Error::Kvmi(KvmiError::Inval, Command::VmSetPageAccess)
        ));
        vm.get_info().unwrap();
    });
}

#[test]
fn denied_accesses_are_told_and_decided_about() {
    let pf = PfEvent {
        gva: 0x1_0008,
        gpa: 0x5008,
        access: 2,
        ..Default::default()
    };
    let actions = [Action::Continue, Action::Retry, Action::Crash];
    let host = |mut host: Host| {
        let header = receive(&mut host, 0, 1);
        host.vcpu_event(1, 2, 17, pf.as_bytes());
        host.succeed(&header, &[]);
        assert_eq!(host.receive_reply(1), (2, 17, 0));
        for (seq, action) in [(2, 1), (3, 2)] {
            host.vcpu_event(seq, 2, 17, pf.as_bytes());
            assert_eq!(host.receive_reply(seq), (2, 17, action));
        }
    };
    with_host(host, |mut vm| {
        vm.set_page_access(pages(1)).unwrap();
        for action in actions {
            let Event::Vcpu(event) = vm.next_event(LONG).unwrap() else {
                panic!("not an event of a vCPU");
            };
            let expected = VcpuEventKind::Pf {
                gva: Some(0x1_0008),
                gpa: 0x5008,
                access: Access::W,
            };
            assert_eq!((event.vcpu, &event.kind), (2, &expected));
            vm.reply_event(&event, action).unwrap();
        }
    });
}
