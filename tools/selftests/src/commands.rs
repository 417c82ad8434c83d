// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Each command: what it does, and every argument that it refuses.

use std::ops::Range;

use kvmi_abi::{
    command::{Features, GetVersionReply},
    wire::{MAX_MSG_SIZE, VERSION},
    Command, Event, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    harness::{test, Ctx, Test},
    tool::{check, range, write_payload},
    vm::{Guest, TestVm, SCRATCH},
};

const AREA: &str = "commands";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(version_and_limits_are_told),
    test!(info_counts_the_vcpus),
    test!(unserved_ids_are_answered_with_enosys),
    test!(replies_carry_the_sequence_number_of_the_command),
    test!(replies_come_in_the_order_of_the_commands),
    test!(every_padding_byte_must_be_zero),
    test!(flags_other_than_zero_and_one_are_invalid),
    test!(missing_bytes_are_zero_and_surplus_ones_ignored),
    test!(disallowed_command_is_refused_whatever_its_arguments),
    test!(only_vm_events_can_be_controlled),
    test!(cleanup_can_be_set),
];

fn version_and_limits_are_told(_: &Ctx) {
    let vm = TestVm::new();
    let reply = vm.hook().version();
    let expected = GetVersionReply {
        version: VERSION,
        max_msg_size: 8184,
        features: Features {
            singlestep: reply.features.singlestep,
            padding: [0; 7],
        },
    };
    assert_eq!(reply, expected);
    assert!(reply.features.singlestep <= 1);
}

fn info_counts_the_vcpus(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.info().vcpu_count, 0);
    vm.start(Guest::Count);
    assert_eq!(tool.info().vcpu_count, 1);
    let _never_run = vm.create_vcpu();
    let info = tool.info();
    assert_eq!((info.vcpu_count, info.padding), (2, [0; 3]));
}

fn unserved_ids_are_answered_with_enosys(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    let served = |id| Command::from_id(id).is_some_and(Command::is_served);
    let ids = (0..=300).chain(0x7fe0..0x8020).chain(0xff80..=0xffff);
    // An event reply that nobody waits for, id 1, is another matter.
    for id in ids.filter(|id| *id != 1 && !served(*id)) {
        let payload = vec![0xff; usize::from(id % 40)];
        let reply = tool.call_raw(id, &payload);
        assert_eq!(reply, Err(KvmiError::NoSys), "id {id}");
    }
}

fn replies_carry_the_sequence_number_of_the_command(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    for seq in [0, 1, 1, 0, u32::MAX, 0x8000_0000, 0x1234_5678, 1] {
        tool.send_raw(&crate::tool::message(2, seq, &[]));
        assert!(tool.reply_to(2, seq).is_ok());
        tool.send_raw(&crate::tool::message(0x4000, seq, &[]));
        assert_eq!(tool.reply_to(0x4000, seq), Err(KvmiError::NoSys));
    }
}

fn replies_come_in_the_order_of_the_commands(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    for (page, value) in (0..30).zip(1..) {
        vm.memory.fill(SCRATCH + page * 4096, 4096, value);
    }
    // Small enough to fit in the socket's buffers without being read.
    let sent: Vec<(u16, u32)> = (0..30)
        .flat_map(|page| {
            let read = range(SCRATCH + page * 4096, 64);
            let read = tool.send(12, read.as_bytes());
            [(12, read), (8, tool.send(8, &[])), (99, tool.send(99, &[]))]
        })
        .collect();
    let mut value = 0;
    for (id, seq) in sent {
        let reply = tool.reply_to(id, seq);
        match id {
            12 => {
                value += 1;
                assert_eq!(reply, Ok(vec![value; 64]));
            }
            8 => assert!(reply.is_ok()),
            _ => assert_eq!(reply, Err(KvmiError::NoSys)),
        }
    }
}

/// Each command with arguments: valid ones, and where in them the padding is.
fn commands_with_padding() -> [(Command, Vec<u8>, Range<usize>); 6] {
    [
        (Command::VmCheckCommand, check(2).as_bytes().to_vec(), 2..8),
        (Command::VmCheckEvent, check(0).as_bytes().to_vec(), 2..8),
        (Command::VmControlEvents, vec![0, 0, 1, 0, 0, 0, 0, 0], 3..8),
        (
            Command::VmReadPhysical,
            range(SCRATCH, 8).as_bytes().to_vec(),
            10..16,
        ),
        (
            Command::VmWritePhysical,
            write_payload(SCRATCH, &[0xaa; 8]),
            10..16,
        ),
        (
            Command::VmControlCleanup,
            vec![1, 0, 0, 0, 0, 0, 0, 0],
            1..8,
        ),
    ]
}

fn every_padding_byte_must_be_zero(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    for (command, good, padding) in commands_with_padding() {
        assert!(tool.call(command, &good).is_ok(), "{command:?}");
        vm.memory.fill(SCRATCH, 8, 0x55);
        for at in padding {
            for value in [1, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let reply = tool.call(command, &bad);
                assert_eq!(reply, Err(KvmiError::Inval), "{command:?}, byte {at}");
            }
        }
        // A refused command has done nothing.
        assert_eq!(vm.memory.read(SCRATCH, 8), [0x55; 8], "{command:?}");
    }
}

fn flags_other_than_zero_and_one_are_invalid(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    for flag in 0..=u8::MAX {
        let expected = match flag {
            0 | 1 => Ok(vec![]),
            _ => Err(KvmiError::Inval),
        };
        let cleanup = tool.call(Command::VmControlCleanup, &[flag, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(cleanup, expected, "flag {flag}");
        let events = tool.call(Command::VmControlEvents, &[0, 0, flag, 0, 0, 0, 0, 0]);
        assert_eq!(events, expected, "flag {flag}");
    }
}

fn missing_bytes_are_zero_and_surplus_ones_ignored(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    vm.memory.write(SCRATCH, b"surplus");
    // GET_VERSION has no arguments: all is surplus, up to the largest message there may be.
    for len in [0, 1, 8, 4096, MAX_MSG_SIZE] {
        let reply = tool.call(Command::GetVersion, &vec![0xff; len]);
        assert_eq!(reply.map(|data| data.len()), Ok(16), "{len} bytes");
    }
    // The id of CHECK_COMMAND alone, with and without its upper byte.
    for len in 1..8 {
        let check = &check(2).as_bytes().to_vec()[..len];
        assert_eq!(tool.call(Command::VmCheckCommand, check), Ok(vec![]));
    }
    assert_eq!(
        tool.call(Command::VmCheckCommand, &[]),
        Err(KvmiError::NoEnt)
    );
    assert_eq!(tool.call(Command::VmCheckEvent, &[]), Ok(vec![]));
    assert_eq!(tool.call(Command::VmControlEvents, &[]), Ok(vec![]));
    assert_eq!(tool.call(Command::VmControlCleanup, &[1]), Ok(vec![]));

    // Address and low byte of the size are enough for a read.
    let mut read = range(SCRATCH, 7).as_bytes().to_vec();
    let data = Ok(b"surplus".to_vec());
    assert_eq!(tool.call(Command::VmReadPhysical, &read[..9]), data);
    assert_eq!(
        tool.call(Command::VmReadPhysical, &read[..8]),
        Err(KvmiError::Inval)
    );
    assert_eq!(
        tool.call(Command::VmReadPhysical, &[]),
        Err(KvmiError::Inval)
    );
    read.resize(MAX_MSG_SIZE, 0xff);
    assert_eq!(tool.call(Command::VmReadPhysical, &read), data);

    let mut write = write_payload(SCRATCH, b"SUR");
    write.resize(MAX_MSG_SIZE, 0xff);
    assert_eq!(tool.call(Command::VmWritePhysical, &write), Ok(vec![]));
    assert_eq!(vm.memory.read(SCRATCH, 8), b"SURplus\0");
}

fn disallowed_command_is_refused_whatever_its_arguments(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    for (command, _, _) in &commands_with_padding()[2..] {
        for payload in [vec![], vec![0xff; 16], vec![0xff; 300]] {
            let reply = tool.call(*command, &payload);
            assert_eq!(reply, Err(KvmiError::Perm), "{command:?}");
        }
    }
}

fn only_vm_events_can_be_controlled(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    for id in (1..64).chain([0x100, 0x8000, u16::MAX]) {
        let [low, high] = id.to_le_bytes();
        let reply = tool.call(Command::VmControlEvents, &[low, high, 1]);
        assert_eq!(reply, Err(KvmiError::Inval), "event {id}");
    }
    assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
}

fn cleanup_can_be_set(_: &Ctx) {
    let vm = TestVm::counting(1);
    for enable in [0, 1, 0] {
        let mut tool = vm.hook_allowing_all();
        assert_eq!(tool.call(Command::VmControlCleanup, &[enable]), Ok(vec![]));
        vm.unhook();
        vm.expect_usable();
    }
}
