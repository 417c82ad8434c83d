// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Pausing a VM whose host follows a script.

mod common;

use std::{sync::mpsc, time::Duration};

use common::{with_host, Host};
use kvmi_client::{Action, Command, Error, Event, KvmiError};

const LONG: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(50);

const CONTINUE: u8 = 0;
const PAUSE: u8 = 1;

#[test]
fn all_vcpus_are_paused_and_run_on_when_the_guard_is_dropped() {
    let host = |mut host: Host| {
        host.tell_vcpus(3);
        host.accept_pause(0);
        // Anything may come in between, in any order.
        host.vcpu_event(1, 0, 1, &[]);
        host.event(2);
        host.accept_pause(1);
        host.accept_pause(2);
        host.vcpu_event(3, 2, 1, &[]);
        host.vcpu_event(4, 1, 1, &[]);

        let (header, _) = host.receive_for(1, Command::VcpuGetXcr);
        host.succeed(&header, &[7, 0, 0, 0, 0, 0, 0, 0]);
        for (vcpu, seq) in [(0, 1), (1, 4), (2, 3)] {
            assert_eq!(host.receive_reply(seq), (vcpu, PAUSE, CONTINUE));
        }
        host.tell_vcpus(3);
    };
    with_host(host, |mut vm| {
        let mut paused = vm.pause_all(LONG).unwrap();
        let rips: Vec<_> = paused.vcpus().iter().map(|v| v.arch.regs.rip).collect();
        assert_eq!(rips, [0, 1, 2]);
        assert!(paused.dormant().is_empty());
        assert_eq!(paused.get_xcr0(1).unwrap(), 7);
        drop(paused);
        vm.get_info().unwrap();
        let event = vm.try_event().unwrap();
        assert!(matches!(event, Some(Event::Unhook { seq: 2 })));
    });
}

#[test]
fn vcpu_that_is_taken_does_not_run_on_with_the_others() {
    let host = |mut host: Host| {
        host.tell_vcpus(2);
        host.accept_pause(0);
        host.accept_pause(1);
        host.vcpu_event(1, 0, 1, &[]);
        host.vcpu_event(2, 1, 1, &[]);
        assert_eq!(host.receive_reply(2), (1, PAUSE, CONTINUE));
        host.tell_vcpus(2);
        assert_eq!(host.receive_reply(1), (0, PAUSE, CONTINUE));
    };
    with_host(host, |mut vm| {
        let mut paused = vm.pause_all(LONG).unwrap();
        let taken = paused.take(0).unwrap();
        assert!(paused.take(0).is_none());
        let left: Vec<_> = paused.vcpus().iter().map(|event| event.vcpu).collect();
        assert_eq!((taken.vcpu, &left[..]), (0, &[1][..]));
        paused.resume().unwrap();
        vm.get_info().unwrap();
        vm.reply_event(&taken, Action::Continue).unwrap();
    });
}

#[test]
fn vcpu_that_is_not_started_is_left_alone() {
    let host = |mut host: Host| {
        host.tell_vcpus(3);
        host.accept_pause(0);
        for vcpu in [1, 2] {
            let (header, _) = host.receive_for(vcpu, Command::VcpuGetInfo);
            host.fail(&header, KvmiError::Again);
        }
        host.vcpu_event(1, 0, 1, &[]);
        // Until vCPU 0 was paused it could start vCPU 1.
        host.accept_pause(1);
        let (header, _) = host.receive_for(2, Command::VcpuGetInfo);
        host.fail(&header, KvmiError::Again);
        host.vcpu_event(2, 1, 1, &[]);
        let (header, _) = host.receive_for(2, Command::VcpuGetInfo);
        host.fail(&header, KvmiError::Again);
        for seq in [1, 2] {
            let vcpu = seq as u16 - 1;
            assert_eq!(host.receive_reply(seq), (vcpu, PAUSE, CONTINUE));
        }
    };
    with_host(host, |mut vm| {
        let paused = vm.pause_all(LONG).unwrap();
        assert_eq!((paused.vcpus().len(), paused.dormant()), (2, &[2][..]));
        paused.resume().unwrap();
    });
}

#[test]
fn refusal_lets_those_run_on_that_were_paused() {
    let host = |mut host: Host| {
        host.tell_vcpus(2);
        host.accept_pause(0);
        // That a command is not allowed does not tell whether the vCPU is started.
        let (header, _) = host.receive_for(1, Command::VcpuGetInfo);
        host.fail(&header, KvmiError::Perm);
        let (header, _) = host.receive();
        host.fail(&header, KvmiError::Busy);
        host.vcpu_event(1, 0, 1, &[]);
        assert_eq!(host.receive_reply(1), (0, PAUSE, CONTINUE));
        host.tell_vcpus(2);
    };
    with_host(host, |mut vm| {
        let error = vm.pause_all(LONG).map(drop).unwrap_err();
        let busy = Error::Kvmi(KvmiError::Busy, Command::VmPauseVcpu);
        assert_eq!(error.to_string(), busy.to_string());
        vm.get_info().unwrap();
    });
}

#[test]
fn vcpu_that_does_not_pause_in_time_ends_the_connection() {
    let host = |mut host: Host| {
        host.tell_vcpus(2);
        host.accept_pause(0);
        host.accept_pause(1);
        host.vcpu_event(1, 0, 1, &[]);
        host.wait_for_end();
    };
    with_host(host, |mut vm| {
        let error = vm.pause_all(SHORT).map(drop).unwrap_err();
        assert!(matches!(error, Error::NotPaused(1)), "{error}");
        assert!(error.to_string().contains("KVM_RUN"), "{error}");
        assert!(matches!(vm.get_info(), Err(Error::Unusable)));
        // The host has seen the end although the connection still exists here.
    });
}

#[test]
fn connection_that_breaks_while_paused_does_not_leave_the_guest_frozen() {
    let (done, wait) = mpsc::channel::<()>();
    let host = move |mut host: Host| {
        host.tell_vcpus(1);
        host.accept_pause(0);
        host.vcpu_event(1, 0, 1, &[]);
        host.receive_for(0, Command::VcpuGetXcr);
        // No answer.
        host.wait_for_end();
        assert!(wait.recv().is_err());
    };
    with_host(host, |mut vm| {
        let mut paused = vm.pause_all(LONG).unwrap();
        paused.set_timeout(Some(SHORT));
        let error = paused.get_xcr0(0).unwrap_err();
        assert!(matches!(error, Error::VcpuTimeout { vcpu: 0, .. }));
        assert!(matches!(paused.resume(), Err(Error::Unusable)));
        drop(done);
    });
}

#[test]
fn host_that_hangs_up_while_pausing_is_an_error() {
    let host = |mut host: Host| {
        host.tell_vcpus(1);
        host.accept_pause(0);
    };
    with_host(host, |mut vm| {
        let error = vm.pause_all(LONG).map(drop).unwrap_err();
        assert!(matches!(error, Error::Closed));
    });
}

#[test]
fn vm_without_vcpus_is_paused_already() {
    let host = |mut host: Host| host.tell_vcpus(0);
    with_host(host, |mut vm| {
        assert!(vm.pause_all(SHORT).unwrap().vcpus().is_empty());
    });
}
