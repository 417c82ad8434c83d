// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Guest memory through the connection, from a host that has some.

mod common;

use std::ops::ControlFlow;

use common::{with_host, Host};
use kvmi_client::{abi::command::GuestRange, Command, Error, KvmiError, ProtocolError};
use zerocopy::FromBytes as _;

/// A host that keeps `memory`, the first page of which is at 0x1000, until the tool hangs up.
fn serve_memory(mut host: Host, memory: &mut [u8], commands: usize) {
    for _ in 0..commands {
        let (header, payload) = host.receive();
        let (range, data) = GuestRange::read_from_prefix(&payload).unwrap();
        assert!(range.is_valid());
        let start = usize::try_from(range.gpa).unwrap() - 0x1000;
        let Some(part) = memory.get_mut(start..start + usize::from(range.size)) else {
            host.fail(&header, KvmiError::NoEnt);
            continue;
        };
        if header.id == Command::VmWritePhysical.id() {
            part.copy_from_slice(data);
            host.succeed(&header, &[]);
        } else {
            assert_eq!(data.len(), 0);
            host.succeed(&header, part);
        }
    }
}

#[test]
fn memory_of_any_length_is_read_and_written_page_by_page() {
    let mut memory: Vec<u8> = (0..3 * 4096u32).map(|i| (i % 251) as u8).collect();
    let original = memory.clone();
    let data: Vec<u8> = (0..5000u32).map(|i| (i % 7) as u8).collect();
    with_host(
        |host| serve_memory(host, &mut memory, 3 + 2 + 1 + 2),
        |mut vm| {
            let mut all = vec![0; 3 * 4096];
            vm.read_physical(0x1000, &mut all).unwrap();
            assert_eq!(all, original);
            vm.write_physical(0x1ff0, &data[..100]).unwrap();
            vm.read_physical(5, &mut []).unwrap();
            vm.write_physical(u64::MAX, &[]).unwrap();
            assert!(matches!(
                vm.read_physical(u64::MAX, &mut all),
                Err(Error::Range)
            ));
            let mut small = [0; 4];
            vm.read_physical(0x2000, &mut small).unwrap();
            assert_eq!(small, data[0x10..0x14]);
            // What lies before the end of the memory is there nevertheless.
            let mut beyond = [0xee; 8];
            let error = vm.read_physical(0x3ffc, &mut beyond).unwrap_err();
            assert!(matches!(error, Error::Kvmi(KvmiError::NoEnt, _)));
            assert_eq!(beyond[..4], original[3 * 4096 - 4..]);
            assert_eq!(beyond[4..], [0xee; 4]);
        },
    );
    assert_eq!(memory[0xff0..0xff0 + 100], data[..100]);
}

#[test]
fn scan_gives_every_page_in_order_and_keeps_events() {
    let mut memory: Vec<u8> = (0..100 * 4096u32).map(|i| (i / 4096) as u8).collect();
    let host = |mut host: Host| {
        host.event(1);
        serve_memory(host, &mut memory, 103);
    };
    with_host(host, |mut vm| {
        let mut next = 0x1001;
        let mut absent = 0;
        let outcome = vm.scan_physical(0x1001, 102 * 4096, |piece, bytes| {
            assert_eq!(piece.gpa, next);
            next += piece.len as u64;
            match bytes {
                Ok(bytes) => assert_eq!(bytes, vec![(piece.gpa / 4096 - 1) as u8; piece.len]),
                Err(error) => {
                    assert_eq!(error, KvmiError::NoEnt);
                    absent += 1;
                }
            }
            ControlFlow::<()>::Continue(())
        });
        assert_eq!(outcome.unwrap(), ControlFlow::Continue(()));
        assert_eq!((next, absent), (0x1001 + 102 * 4096, 3));
        assert!(vm.try_event().unwrap().is_some());
        assert!(matches!(vm.get_info(), Err(Error::Closed)));
    });
}

#[test]
fn connection_is_usable_after_a_scan_was_broken_off() {
    let mut memory = vec![0; 4096];
    let host = |mut host: Host| loop {
        let (header, _) = host.receive();
        if header.id == Command::VmGetInfo.id() {
            return host.succeed(&header, &[0; 16]);
        }
        memory.fill(header.seq as u8);
        host.succeed(&header, &memory);
    };
    with_host(host, |mut vm| {
        let mut pages = 0;
        let outcome = vm.scan_physical(0, 1 << 50, |_, bytes| {
            pages += 1;
            assert_eq!(bytes.unwrap()[0], pages);
            match pages {
                3 => ControlFlow::Break("enough"),
                _ => ControlFlow::Continue(()),
            }
        });
        assert_eq!((outcome.unwrap(), pages), (ControlFlow::Break("enough"), 3));
        vm.get_info().unwrap();
    });
}

#[test]
fn scan_does_not_survive_a_wrong_reply() {
    let host = |mut host: Host| {
        let (header, _) = host.receive();
        host.succeed(&header, &[0; 4095]);
        while std::io::Read::read(&mut host.0, &mut [0; 64]).is_ok_and(|n| n != 0) {}
    };
    with_host(host, |mut vm| {
        let outcome = vm.scan_physical(0, 1 << 20, |_, _| ControlFlow::<()>::Continue(()));
        assert!(matches!(
            outcome,
            Err(Error::Protocol(ProtocolError::Size { got: 4095, .. }))
        ));
        assert!(matches!(vm.get_info(), Err(Error::Unusable)));
    });
}
