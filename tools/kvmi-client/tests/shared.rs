// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Several threads that use one socket.

mod common;

use std::{sync::mpsc, thread, time::Duration};

use common::{with_host, Host};
use kvmi_client::{Action, Command, Error, Event, KvmiError, ProtocolError};

const LONG: Option<Duration> = Some(Duration::from_secs(5));
const SHORT: Option<Duration> = Some(Duration::from_millis(50));

#[test]
fn replies_go_to_whoever_gave_the_command() {
    const THREADS: u16 = 4;
    const ROUNDS: u64 = 50;
    // All threads have a command under way; the first is replied to last.
    let host = |mut host: Host| {
        for _ in 0..ROUNDS {
            let mut commands: Vec<_> = (0..THREADS).map(|_| host.receive()).collect();
            while let Some((header, payload)) = commands.pop() {
                assert_eq!(header.id, Command::VcpuGetXcr.id());
                let vcpu = payload[0].into();
                if vcpu == 3 {
                    host.fail(&header, KvmiError::Again);
                } else {
                    host.succeed(&header, &u64::to_ne_bytes(vcpu));
                }
            }
        }
    };
    with_host(host, |vm| {
        let (_events, hub) = vm.share().unwrap();
        thread::scope(|scope| {
            for vcpu in 0..THREADS {
                let mut vm = hub.connection();
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        match vm.get_xcr0(vcpu) {
                            Ok(xcr0) => assert_eq!(xcr0, vcpu.into()),
                            Err(Error::Kvmi(KvmiError::Again, _)) => assert_eq!(vcpu, 3),
                            Err(error) => panic!("{error}"),
                        }
                    }
                });
            }
        });
    });
}

#[test]
fn events_go_to_the_first_connection_only() {
    let host = |mut host: Host| {
        host.event(1);
        let (header, _) = host.receive();
        host.vcpu_event(2, 1, 1, &[]);
        host.succeed(&header, &[0; 16]);
        assert_eq!(host.receive_reply(2), (1, 1, 0));
        host.wait_for_end();
    };
    with_host(host, |vm| {
        let (mut events, hub) = vm.share().unwrap();
        let mut other = hub.connection();
        other.get_info().unwrap();
        assert!(matches!(other.try_event(), Ok(None)));
        assert!(matches!(other.next_event(SHORT), Err(Error::Timeout)));
        let unhook = events.next_event(LONG).unwrap();
        assert!(matches!(unhook, Event::Unhook { seq: 1 }));
        let Event::Vcpu(pause) = events.next_event(LONG).unwrap() else {
            panic!("no event of a vCPU");
        };
        events.reply_event(&pause, Action::Continue).unwrap();
    });
}

#[test]
fn what_arrived_before_sharing_is_not_lost() {
    let host = |mut host: Host| {
        host.event(1);
        let (header, _) = host.receive();
        host.event(2);
        host.succeed(&header, &[0; 16]);
        host.event(3);
        let (header, _) = host.receive();
        host.succeed(&header, &[0; 16]);
        host.wait_for_end();
    };
    with_host(host, |mut vm| {
        vm.get_info().unwrap();
        let (mut events, hub) = vm.share().unwrap();
        hub.connection().get_info().unwrap();
        for expected in 1..=3 {
            let event = events.next_event(LONG).unwrap();
            assert!(matches!(event, Event::Unhook { seq } if seq == expected));
        }
    });
}

#[test]
fn reply_that_does_not_come_in_time_harms_nobody_else() {
    let (late, wait) = mpsc::channel();
    let host = move |mut host: Host| {
        let (first, _) = host.receive();
        wait.recv().unwrap();
        host.succeed(&first, &[0; 16]);
        let (second, _) = host.receive();
        host.succeed(&second, &[0; 16]);
    };
    with_host(host, |vm| {
        let (_events, hub) = vm.share().unwrap();
        let (mut slow, mut other) = (hub.connection(), hub.connection());
        slow.set_timeout(SHORT);
        assert!(matches!(slow.get_info(), Err(Error::Timeout)));
        late.send(()).unwrap();
        other.get_info().unwrap();
        assert!(matches!(slow.get_info(), Err(Error::Unusable)));
    });
}

#[test]
fn hang_up_ends_the_waiting_of_all() {
    let host = |mut host: Host| {
        for _ in 0..3 {
            host.receive();
        }
    };
    with_host(host, |vm| {
        let (mut events, hub) = vm.share().unwrap();
        thread::scope(|scope| {
            for _ in 0..3 {
                let mut vm = hub.connection();
                scope.spawn(move || assert!(matches!(vm.get_info(), Err(Error::Closed))));
            }
            assert!(matches!(events.next_event(LONG), Err(Error::Closed)));
        });
        // Whoever comes later does not wait at all.
        assert!(matches!(hub.connection().get_info(), Err(Error::Closed)));
        assert!(matches!(
            hub.connection().next_event(None),
            Err(Error::Closed)
        ));
    });
}

#[test]
fn reply_to_nobody_breaks_the_protocol_for_all() {
    for repeated in [false, true] {
        let host = move |mut host: Host| {
            let (mut header, _) = host.receive();
            if repeated {
                host.succeed(&header, &[0; 16]);
            } else {
                header.seq += 1;
            }
            host.succeed(&header, &[0; 16]);
            host.wait_for_end();
        };
        with_host(host, |vm| {
            let (mut events, hub) = vm.share().unwrap();
            assert_eq!(hub.connection().get_info().is_ok(), repeated);
            let error = events.next_event(LONG).unwrap_err();
            let expected = ProtocolError::UnexpectedMessage {
                id: Command::VmGetInfo.id(),
                seq: if repeated { 1 } else { 2 },
            };
            assert!(
                matches!(error, Error::Protocol(e) if e == expected),
                "{error}"
            );
        });
    }
}

#[test]
fn event_that_nobody_can_reply_to_breaks_the_connection() {
    let host = |mut host: Host| {
        host.event(1);
        let (header, _) = host.receive();
        host.succeed(&header, &[0; 16]);
        host.vcpu_event(2, 0, 1, &[]);
        host.wait_for_end();
    };
    with_host(host, |vm| {
        let (events, hub) = vm.share().unwrap();
        drop(events);
        let mut vm = hub.connection();
        vm.get_info().unwrap();
        assert!(matches!(vm.next_event(LONG), Err(Error::Protocol(_))));
    });
}

#[test]
fn socket_is_closed_when_all_are_gone() {
    let (gone, wait) = mpsc::channel();
    let host = move |mut host: Host| {
        let (header, _) = host.receive();
        host.succeed(&header, &[0; 16]);
        host.wait_for_end();
        gone.send(()).unwrap();
    };
    with_host(host, |vm| {
        let (events, hub) = vm.share().unwrap();
        drop(events);
        let mut last = hub.connection();
        drop(hub);
        last.get_info().unwrap();
        assert!(wait.recv_timeout(Duration::from_millis(20)).is_err());
        drop(last);
        wait.recv_timeout(Duration::from_secs(5)).unwrap();
    });
}
