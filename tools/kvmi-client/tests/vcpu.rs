// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The commands and events of vCPUs against a host that follows a script.

mod common;

use std::{sync::mpsc, time::Duration};

use common::{with_host, Host};
use kvmi_client::{
    abi::{
        arch::{Regs, Sregs},
        vcpu::{CpuidReply, GetRegistersReply, MsrEntry, TrapEvent},
        wire::Header,
    },
    Action, Command, Connection, Error, Event, EventId, KvmiError, ProtocolError, VcpuEventKind,
};
use zerocopy::IntoBytes as _;

const LONG: Option<Duration> = Some(Duration::from_secs(5));
const SHORT: Option<Duration> = Some(Duration::from_millis(50));

#[test]
fn requests_are_laid_out_as_the_protocol_says() {
    let expected: [(Command, &[u8]); 9] = [
        (Command::VcpuGetInfo, &[]),
        (Command::VcpuControlEvents, &[9, 0, 1, 0, 0, 0, 0, 0]),
        (Command::VcpuGetCpuid, &[7, 0, 0, 0, 2, 0, 0, 0]),
        (
            Command::VcpuInjectException,
            &[14, 0, 0, 0, 2, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0x80],
        ),
        (Command::VcpuGetXcr, &[0; 8]),
        (Command::VcpuGetXsave, &[]),
        (Command::VcpuSetXsave, &[5; 4096]),
        (Command::VcpuGetMtrrType, &[0, 0, 0, 0, 1, 0, 0, 0]),
        (Command::VcpuTranslateGva, &[1, 2, 3, 4, 5, 6, 7, 8]),
    ];
    let cpuid = CpuidReply {
        eax: 1,
        ebx: 2,
        ecx: 3,
        edx: 4,
    };
    let answers: [&[u8]; 9] = [
        &[1, 2, 0, 0, 0, 0, 0, 0],
        &[],
        cpuid.as_bytes(),
        &[],
        &[7, 0, 0, 0, 0, 0, 0, 0],
        &[3; 4096],
        &[],
        &[6, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0x10, 0, 0, 0, 0, 0, 0],
    ];
    let host = |mut host: Host| {
        for ((command, wanted), answer) in expected.iter().zip(answers) {
            let (header, payload) = host.receive_for(0x0102, *command);
            assert_eq!(payload, *wanted, "{command:?}");
            host.succeed(&header, answer);
        }
    };
    with_host(host, |mut vm| {
        let vcpu = 0x0102;
        assert_eq!(vm.vcpu_info(vcpu).unwrap().tsc_speed, 0x201);
        vm.vcpu_control_events(vcpu, EventId::Trap, true).unwrap();
        assert_eq!(vm.get_cpuid(vcpu, 7, 2).unwrap(), cpuid);
        vm.inject_exception(vcpu, 14, 2, 1 << 63 | 0x1000).unwrap();
        assert_eq!(vm.get_xcr0(vcpu).unwrap(), 7);
        assert_eq!(vm.get_xsave(vcpu).unwrap(), [3; 4096]);
        vm.set_xsave(vcpu, &[5; 4096]).unwrap();
        assert_eq!(vm.get_mtrr_type(vcpu, 1 << 32).unwrap(), 6);
        let gva = 0x0807_0605_0403_0201;
        assert_eq!(vm.translate_gva(vcpu, gva).unwrap(), Some(0x1000));
    });
}

#[test]
fn registers_are_read_and_set() {
    let mut reply = GetRegistersReply {
        mode: 4,
        nmsrs: 2,
        ..Default::default()
    };
    reply.regs.rip = 0xfff0;
    reply.sregs.cr3 = 0x1000;
    let entry = |index, data| MsrEntry {
        index,
        reserved: 0,
        data,
    };
    let regs = Regs {
        rax: 1,
        rflags: 2,
        ..Default::default()
    };
    let host = |mut host: Host| {
        let (header, payload) = host.receive_for(3, Command::VcpuGetRegisters);
        let expected = [2u8, 0, 0, 0, 0, 0, 0, 0, 0x82, 0, 0, 0xc0, 0x10, 0, 0, 0];
        assert_eq!(payload, expected);
        let msrs = [entry(0xc000_0082, 5), entry(0x10, 6)];
        host.succeed(&header, &[reply.as_bytes(), msrs.as_bytes()].concat());
        let (header, payload) = host.receive_for(3, Command::VcpuSetRegisters);
        assert_eq!(payload, regs.as_bytes());
        host.fail(&header, KvmiError::OpNotSupp);
    };
    with_host(host, |mut vm| {
        let registers = vm.get_registers(3, &[0xc000_0082, 0x10]).unwrap();
        assert_eq!((registers.mode, registers.regs.rip), (4, 0xfff0));
        let sregs = Sregs {
            cr3: 0x1000,
            ..Default::default()
        };
        assert_eq!(registers.sregs, sregs);
        assert_eq!(registers.msrs, [(0xc000_0082, 5), (0x10, 6)]);
        // Too many to ask for; nothing is sent.
        for msrs in [vec![0; 3000], vec![0; 70_000]] {
            assert!(matches!(vm.get_registers(3, &msrs), Err(Error::Range)));
        }
        let error = vm.set_registers(3, &regs).unwrap_err();
        assert!(matches!(error, Error::Kvmi(KvmiError::OpNotSupp, _)));
    });
}

/// Runs one command against a host that answers it with `data`; it must break the connection.
fn broken_by<R>(
    data: &[u8],
    command: impl FnOnce(&mut Connection<std::os::unix::net::UnixStream>) -> Result<R, Error>,
) -> ProtocolError {
    let host = |mut host: Host| {
        let (header, _) = host.receive();
        host.succeed(&header, data);
    };
    with_host(host, |mut vm| {
        let Err(Error::Protocol(error)) = command(&mut vm) else {
            panic!("not a violation of the protocol");
        };
        assert!(matches!(vm.get_info(), Err(Error::Unusable)));
        error
    })
}

#[test]
fn cut_or_wrong_replies_are_protocol_errors() {
    let size = |got, wanted| ProtocolError::Size { got, wanted };
    assert_eq!(broken_by(&[0; 7], |vm| vm.vcpu_info(0)), size(7, 8));
    let xsave = broken_by(&[0; 4095], |vm| vm.get_xsave(0));
    assert_eq!(xsave, size(4095, 4096));
    let registers = broken_by(&[0; 471], |vm| vm.get_registers(0, &[]));
    assert_eq!(registers, size(471, 472));
    let msrs = broken_by(&[0; 488], |vm| vm.get_registers(0, &[1]));
    assert_eq!(msrs, ProtocolError::WrongMsrs);
    assert_eq!(broken_by(&[], |vm| vm.translate_gva(0, 0)), size(0, 8));
}

#[test]
fn reply_of_another_vcpu_command_is_not_taken() {
    let host = |mut host: Host| {
        let (header, _) = host.receive();
        let other = Header {
            seq: header.seq + 1,
            ..header
        };
        host.succeed(&other, &[0; 8]);
    };
    with_host(host, |mut vm| {
        let error = vm.get_xcr0(0).unwrap_err();
        let expected = ProtocolError::UnexpectedMessage { id: 17, seq: 2 };
        assert!(matches!(error, Error::Protocol(e) if e == expected));
    });
}

#[test]
fn vcpu_that_is_not_run_is_told_by_the_error() {
    let (done, wait) = mpsc::channel::<()>();
    let host = move |_host: Host| assert!(wait.recv().is_err());
    with_host(host, |mut vm| {
        vm.set_timeout(SHORT);
        let error = vm.get_xcr0(5).unwrap_err();
        assert!(!error.is_recoverable());
        let text = error.to_string();
        assert!(
            text.contains("vCPU 5") && text.contains("KVM_RUN"),
            "{text}"
        );
        assert!(text.contains("VCPU_GET_XCR"), "{text}");
        assert!(matches!(vm.get_info(), Err(Error::Unusable)));
        drop(done);
    });
}

#[test]
fn events_of_vcpus_come_between_command_and_reply_and_are_replied_to() {
    let trap = TrapEvent {
        nr: 6,
        error_code: 1,
        address: 2,
        ..Default::default()
    };
    let host = |mut host: Host| {
        let (header, _) = host.receive_for(0, Command::VcpuInjectException);
        host.vcpu_event(1, 1, 1, &[]);
        host.succeed(&header, &[]);
        host.vcpu_event(2, 0, 9, trap.as_bytes());
        host.vcpu_event(3, 2, 31, &[1, 2]);
        assert_eq!(host.receive_reply(3), (2, 31, 2));
        assert_eq!(host.receive_reply(1), (1, 1, 0));
        assert_eq!(host.receive_reply(2), (0, 9, 1));
        let (header, _) = host.receive();
        host.succeed(&header, &[0; 16]);
    };
    with_host(host, |mut vm| {
        vm.inject_exception(0, 6, 0, 0).unwrap();
        let is_unknown =
            |event: &Event| matches!(event, Event::Vcpu(event) if event.kind.id() == 31);
        let Event::Vcpu(unknown) = vm.wait_for_event(LONG, is_unknown).unwrap() else {
            panic!("not what was waited for");
        };
        let data = vec![1, 2];
        assert_eq!(unknown.kind, VcpuEventKind::Unknown { id: 31, data });
        vm.reply_event(&unknown, Action::Crash).unwrap();

        // The others are still there, in their order.
        let Event::Vcpu(pause) = vm.next_event(LONG).unwrap() else {
            panic!("no PAUSE event");
        };
        assert_eq!((pause.vcpu, &pause.kind), (1, &VcpuEventKind::Pause));
        assert_eq!(pause.arch.regs.rip, 1);
        vm.reply_event(&pause, Action::Continue).unwrap();
        let Event::Vcpu(trap) = vm.next_event(LONG).unwrap() else {
            panic!("no TRAP event");
        };
        let kind = VcpuEventKind::Trap {
            nr: 6,
            error_code: 1,
            address: 2,
        };
        assert_eq!((trap.vcpu, &trap.kind), (0, &kind));
        vm.reply_event(&trap, Action::Retry).unwrap();
        vm.get_info().unwrap();
    });
}

#[test]
fn waiting_for_a_certain_event_times_out_without_harm() {
    let (go, wait) = mpsc::channel();
    let host = move |mut host: Host| {
        host.event(1);
        wait.recv().unwrap();
        let (header, _) = host.receive();
        host.succeed(&header, &[0; 16]);
    };
    with_host(host, |mut vm| {
        let outcome = vm.wait_for_event(SHORT, |event| matches!(event, Event::Vcpu(_)));
        assert!(matches!(outcome, Err(Error::Timeout)));
        go.send(()).unwrap();
        vm.get_info().unwrap();
        let waiting = vm.try_event().unwrap();
        assert!(matches!(waiting, Some(Event::Unhook { seq: 1 })));
    });
}

#[test]
fn malformed_event_breaks_the_connection() {
    let host = |mut host: Host| {
        host.receive();
        host.vcpu_event(1, 0, 9, &[0; 15]);
    };
    with_host(host, |mut vm| {
        let error = vm.get_info().unwrap_err();
        let size = ProtocolError::Size {
            got: 15,
            wanted: 16,
        };
        assert!(matches!(error, Error::Protocol(e) if e == size));
        assert!(matches!(vm.get_info(), Err(Error::Unusable)));
    });
    let host = |mut host: Host| host.vcpu_event(1, 0, 2, &[]);
    with_host(host, |mut vm| {
        let error = vm.wait_for_event(LONG, |_| true).unwrap_err();
        let impossible = ProtocolError::ImpossibleEvent(2);
        assert!(matches!(error, Error::Protocol(e) if e == impossible));
        assert!(matches!(vm.get_info(), Err(Error::Unusable)));
    });
}

/// Translates 0x7000 to 0x3000 and 0x8000 to 0x1000, and nothing else.
fn translate(host: &mut Host) {
    let (header, payload) = host.receive_for(1, Command::VcpuTranslateGva);
    let gva = u64::from_ne_bytes(payload.try_into().unwrap());
    let gpa = match gva & !0xfff {
        0x7000 => gva - 0x4000,
        0x8000 => gva - 0x7000,
        _ => u64::MAX,
    };
    host.succeed(&header, gpa.as_bytes());
}

#[test]
fn virtual_memory_is_translated_page_by_page() {
    let host = |mut host: Host| {
        for gpa in [0x3ffe_u64, 0x1000] {
            translate(&mut host);
            let (header, payload) = host.receive();
            assert_eq!(header.id, Command::VmReadPhysical.id());
            assert_eq!(payload[..8], gpa.to_ne_bytes());
            host.succeed(&header, &[gpa as u8 + 1; 2]);
        }
        translate(&mut host);
        let (header, payload) = host.receive();
        assert_eq!(header.id, Command::VmWritePhysical.id());
        assert_eq!(payload[..8], 0x1fff_u64.to_ne_bytes());
        assert_eq!(payload[16..], [9]);
        host.succeed(&header, &[]);
        translate(&mut host);
        host.tell_vcpus(1);
    };
    with_host(host, |mut vm| {
        let mut buffer = [0; 4];
        vm.read_virtual(1, 0x7ffe, &mut buffer).unwrap();
        assert_eq!(buffer, [0xff, 0xff, 1, 1]);
        let error = vm.write_virtual(1, 0x8fff, &[9, 8]).unwrap_err();
        assert!(matches!(error, Error::Unmapped(0x9000)));
        let error = vm.read_virtual(1, u64::MAX, &mut buffer).unwrap_err();
        assert!(matches!(error, Error::Range));
        vm.get_info().unwrap();
    });
}
