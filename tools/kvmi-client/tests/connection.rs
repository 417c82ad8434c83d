// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The connection against a host that follows a script.

mod common;

use std::time::{Duration, Instant};

use common::{with_host, Host};
use kvmi_client::{
    abi::{
        command::{Features, GetVersionReply, VmInfo},
        wire::Header,
    },
    Command, Error, Event, EventId, KvmiError, ProtocolError,
};
use zerocopy::IntoBytes as _;

const SHORT: Duration = Duration::from_millis(50);

#[test]
fn replies_are_decoded() {
    let version = GetVersionReply {
        version: 1,
        max_msg_size: 8184,
        features: Features::default(),
    };
    let info = VmInfo {
        vcpu_count: 3,
        ..Default::default()
    };
    let host = |mut host: Host| {
        let (header, payload) = host.receive();
        assert_eq!((header.id, payload.len()), (2, 0));
        host.succeed(&header, version.as_bytes());
        let (header, _) = host.receive();
        assert_eq!(header.id, 8);
        // A newer host may tell more.
        host.succeed(&header, &[info.as_bytes(), &[0xff; 8]].concat());
    };
    with_host(host, |mut vm| {
        assert_eq!(vm.get_version().unwrap(), version);
        assert_eq!(vm.get_info().unwrap(), info);
        assert!(matches!(vm.get_info(), Err(Error::Closed)));
    });
}

#[test]
fn requests_are_laid_out_as_the_protocol_says() {
    let expected: [(u16, &[u8]); 4] = [
        (4, &[12, 0, 0, 0, 0, 0, 0, 0]),
        (6, &[0xff, 0xff, 0, 0, 0, 0, 0, 0]),
        (10, &[0, 0, 1, 0, 0, 0, 0, 0]),
        (18, &[0, 0, 0, 0, 0, 0, 0, 0]),
    ];
    let host = |mut host: Host| {
        for (id, wanted) in expected {
            let (header, payload) = host.receive();
            assert_eq!((header.id, payload.as_slice()), (id, wanted));
            host.succeed(&header, &[]);
        }
    };
    with_host(host, |mut vm| {
        vm.check_command(Command::VmReadPhysical).unwrap();
        vm.check_event(0xffffu16).unwrap();
        vm.control_events(EventId::Unhook, true).unwrap();
        vm.control_cleanup(false).unwrap();
    });
}

#[test]
fn errors_of_the_host_are_values_and_leave_the_connection_usable() {
    let host = |mut host: Host| {
        for error in KvmiError::ALL {
            let (header, _) = host.receive();
            host.fail(&header, error);
        }
        let (header, _) = host.receive();
        host.succeed(&header, &[0; 16]);
    };
    with_host(host, |mut vm| {
        for error in KvmiError::ALL {
            let failed = vm.get_info().unwrap_err();
            assert!(failed.is_recoverable());
            assert!(failed.to_string().contains(error.name()), "{failed}");
            assert!(matches!(failed, Error::Kvmi(e, Command::VmGetInfo) if e == error));
        }
        vm.get_info().unwrap();
    });
}

/// Runs one command against a host that answers it with `answer`, and checks that the error makes
/// the connection unusable.
fn broken_by(answer: impl Fn(&mut Host, Header) + Send) -> Error {
    let host = move |mut host: Host| {
        let (header, _) = host.receive();
        answer(&mut host, header);
    };
    with_host(host, |mut vm| {
        let mut buffer = [0; 4];
        let error = vm.read_physical(0, &mut buffer).unwrap_err();
        assert!(!error.is_recoverable());
        assert!(matches!(vm.get_info(), Err(Error::Unusable)));
        error
    })
}

fn protocol_error(answer: impl Fn(&mut Host, Header) + Send) -> ProtocolError {
    match broken_by(answer) {
        Error::Protocol(error) => error,
        error => panic!("not a violation of the protocol: {error}"),
    }
}

#[test]
fn reply_to_something_else_is_a_protocol_error() {
    let wrong_id = protocol_error(|host, header| host.succeed(&Header { id: 8, ..header }, &[]));
    assert!(matches!(
        wrong_id,
        ProtocolError::UnexpectedMessage { id: 8, .. }
    ));
    let wrong_seq = protocol_error(|host, header| {
        host.succeed(&Header { seq: 77, ..header }, &[0; 4]);
    });
    let expected = ProtocolError::UnexpectedMessage { id: 12, seq: 77 };
    assert_eq!(wrong_seq, expected);
}

#[test]
fn reply_of_a_wrong_size_is_a_protocol_error() {
    for got in [0, 3, 5, 4096] {
        let error = protocol_error(|host, header| host.succeed(&header, &vec![0; got]));
        assert_eq!(error, ProtocolError::Size { got, wanted: 4 });
    }
    let truncated = protocol_error(|host, header| {
        host.header(header.id, 4, header.seq);
        host.send(&[0; 4]);
    });
    assert_eq!(truncated, ProtocolError::Size { got: 4, wanted: 8 });
    let oversized = protocol_error(|host, header| host.header(header.id, 8185, header.seq));
    assert_eq!(oversized, ProtocolError::Oversized(8185));
}

#[test]
fn unknown_error_number_is_a_protocol_error() {
    let error = protocol_error(|host, header| {
        host.header(header.id, 8, header.seq);
        host.send(&(-4242i64).to_ne_bytes());
    });
    assert_eq!(error, ProtocolError::UnknownError(-4242));
}

#[test]
fn hang_up_is_told_from_a_cut_message() {
    assert!(matches!(broken_by(|_, _| ()), Error::Closed));
    let cut = protocol_error(|host, header| host.header(header.id, 12, header.seq));
    assert_eq!(cut, ProtocolError::EndInsideMessage);
}

#[test]
fn events_between_command_and_reply_are_put_aside() {
    let host = |mut host: Host| {
        let (header, _) = host.receive();
        host.event(1);
        host.event(2);
        host.succeed(&header, &[0; 16]);
        host.event(3);
        // Wait for the hang-up.
        assert!(std::io::Read::read(&mut host.0, &mut [0]).is_ok());
    };
    with_host(host, |mut vm| {
        vm.get_info().unwrap();
        for wanted in 1..=3 {
            let event = vm.next_event(Some(Duration::from_secs(5))).unwrap();
            assert!(matches!(event, Event::Unhook { seq } if seq == wanted));
        }
        assert!(vm.try_event().unwrap().is_none());
    });
}

#[test]
fn events_that_nobody_reads_do_not_pile_up_for_ever() {
    let host = |mut host: Host| {
        let event = [0u8, 0, 8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        // The tool gives up sooner or later.
        while std::io::Write::write_all(&mut host.0, &event).is_ok() {}
    };
    with_host(host, |mut vm| {
        let error = vm.get_info().unwrap_err();
        let too_many = ProtocolError::TooManyEvents;
        assert!(matches!(error, Error::Protocol(e) if e == too_many));
    });
}

#[test]
fn waiting_for_an_event_times_out_without_harm_even_inside_a_message() {
    let (first, second) = ([0u8, 0, 8, 0, 9, 0, 0, 0, 0, 0], [0u8; 6]);
    let (go, wait) = std::sync::mpsc::channel();
    let host = move |mut host: Host| {
        wait.recv().unwrap();
        host.send(&first);
        wait.recv().unwrap();
        host.send(&second);
        let (header, _) = host.receive();
        host.succeed(&header, &[0; 16]);
    };
    with_host(host, |mut vm| {
        assert!(vm.try_event().unwrap().is_none());
        assert!(matches!(vm.next_event(Some(SHORT)), Err(Error::Timeout)));
        go.send(()).unwrap();
        assert!(matches!(vm.next_event(Some(SHORT)), Err(Error::Timeout)));
        go.send(()).unwrap();
        let event = vm.next_event(Some(Duration::from_secs(5))).unwrap();
        assert!(matches!(event, Event::Unhook { seq: 9 }));
        vm.get_info().unwrap();
    });
}

#[test]
fn command_without_reply_times_out() {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let host = move |mut host: Host| {
        // A byte now and then does not prolong the wait.
        for byte in [12u8, 0, 12] {
            std::thread::sleep(SHORT / 2);
            // The tool may have given up.
            let _ = std::io::Write::write_all(&mut host.0, &[byte]);
        }
        assert!(wait.recv().is_err());
    };
    with_host(host, |mut vm| {
        vm.set_timeout(Some(SHORT));
        let start = Instant::now();
        assert!(matches!(vm.get_info(), Err(Error::Timeout)));
        assert!(start.elapsed() < 20 * SHORT);
        assert!(matches!(vm.get_info(), Err(Error::Unusable)));
        drop(done);
    });
}

#[test]
fn host_that_does_not_read_cannot_block_a_command_for_ever() {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let host = move |_host: Host| assert!(wait.recv().is_err());
    with_host(host, |mut vm| {
        vm.set_timeout(Some(SHORT));
        let header = Header {
            id: 14,
            size: 8184,
            seq: 1,
        };
        // Far more than a socket holds.
        let sent = (0..10_000).try_for_each(|_| vm.send_raw(&header, &[0; 8184]));
        assert!(matches!(sent, Err(Error::Timeout)));
        drop(done);
    });
}

#[test]
fn raw_messages_go_out_as_they_are_and_come_in_in_order() {
    let host = |mut host: Host| {
        let (header, payload) = host.receive();
        assert_eq!((header.id, header.seq), (0xffff, 42));
        assert_eq!(payload, [1, 2, 3]);
        host.event(1);
        host.fail(&header, KvmiError::NoSys);
    };
    with_host(host, |mut vm| {
        let header = Header {
            id: 0xffff,
            size: 3,
            seq: 42,
        };
        vm.send_raw(&header, &[1, 2, 3]).unwrap();
        assert_eq!(vm.receive_raw().unwrap().header.id, 0);
        let reply = vm.receive_raw().unwrap();
        assert_eq!(reply.header, Header { size: 8, ..header });
        assert_eq!(reply.reply(), Ok(Err(KvmiError::NoSys)));
        assert!(matches!(vm.receive_raw(), Err(Error::Closed)));
    });
}

#[test]
fn command_larger_than_a_message_is_not_sent() {
    let host = |mut host: Host| {
        let (header, _) = host.receive();
        assert_eq!(header.seq, 1);
        host.succeed(&header, &[0; 16]);
    };
    with_host(host, |mut vm| {
        let huge = [0; 8185];
        let error = vm.command(Command::VmWritePhysical, &[&huge]).unwrap_err();
        assert!(matches!(error, Error::Range));
        vm.get_info().unwrap();
    });
}
