// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the VMM allows (COMMAND, EVENT), and how it announces the end (PREUNHOOK).

use std::{
    io::Write as _,
    sync::atomic::{AtomicUsize, Ordering},
};

use kvmi_abi::{
    id::{COMMAND_IDS, EVENT_IDS},
    Command, Event, KvmiError,
};

use crate::{
    harness::{test, Ctx, Test},
    sys::{self, Errno},
    tool::{message, range},
    util::promptly,
    vm::{TestVm, SCRATCH},
};

const AREA: &str = "masks";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(allow_other_than_zero_and_one_is_invalid),
    test!(ids_that_no_version_knows_are_invalid),
    test!(known_ids_can_be_allowed_even_if_not_served),
    test!(always_allowed_commands_cannot_be_disallowed),
    test!(unhooked_vm_has_no_masks),
    test!(each_command_is_allowed_on_its_own),
    test!(disallowing_all_keeps_three_commands),
    test!(revoked_command_is_refused_at_once),
    test!(check_command_tells_unserved_from_disallowed),
    test!(check_event_tells_unserved_from_disallowed),
    test!(event_must_be_allowed_to_be_enabled),
    test!(preunhook_sends_the_event_that_the_tool_enabled),
    test!(preunhook_fails_unless_the_tool_enabled_the_event),
    test!(preunhook_fails_when_the_event_was_revoked),
    test!(preunhook_fails_when_the_tool_has_gone),
    test!(preunhook_and_replies_are_never_mixed_up),
];

/// Ids that are in no version of the protocol; -1 is a special one.
fn unknown(known: impl Fn(u16) -> bool, limit: u16) -> Vec<i32> {
    let unused = (0..limit).filter(|id| !known(*id)).map(i32::from);
    let limit = i32::from(limit);
    let others = [
        -2,
        i32::MIN,
        limit,
        limit + 1,
        32,
        33,
        63,
        64,
        0x10002,
        i32::MAX,
    ];
    unused.chain(others).collect()
}

fn unknown_commands() -> Vec<i32> {
    let ids = unknown(|id| Command::from_id(id).is_some(), COMMAND_IDS);
    assert!([0, 1, 24].iter().all(|id| ids.contains(id)));
    ids
}

fn unknown_events() -> Vec<i32> {
    let ids = unknown(|id| Event::from_id(id).is_some(), EVENT_IDS);
    assert!([2, 4, 18].iter().all(|id| ids.contains(id)));
    ids
}

fn allow_other_than_zero_and_one_is_invalid(_: &Ctx) {
    let vm = TestVm::new();
    for hooked in [false, true] {
        let _tool = hooked.then(|| vm.hook());
        for allow in (1..32).map(|bit| 1 << bit).chain([3, u32::MAX]) {
            for id in [-1, 0, 2, 8] {
                let command = sys::command(&vm, allow, id);
                assert_eq!(command, Err(Errno::INVAL), "allow {allow}, id {id}");
                let event = sys::event(&vm, allow, id);
                assert_eq!(event, Err(Errno::INVAL), "allow {allow}, id {id}");
            }
        }
    }
}

fn ids_that_no_version_knows_are_invalid(_: &Ctx) {
    let vm = TestVm::new();
    for hooked in [false, true] {
        let _tool = hooked.then(|| vm.hook());
        for allow in [0, 1] {
            for id in unknown_commands() {
                assert_eq!(sys::command(&vm, allow, id), Err(Errno::INVAL), "id {id}");
            }
            for id in unknown_events() {
                assert_eq!(sys::event(&vm, allow, id), Err(Errno::INVAL), "id {id}");
            }
        }
    }
}

fn known_ids_can_be_allowed_even_if_not_served(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    for command in Command::ALL {
        let allowed = sys::command(&vm, 1, command.id().into());
        assert_eq!(allowed, Ok(()), "{command:?}");
    }
    for event in Event::ALL {
        assert_eq!(sys::event(&vm, 1, event.id().into()), Ok(()), "{event:?}");
        assert_eq!(sys::event(&vm, 0, event.id().into()), Ok(()), "{event:?}");
    }
    assert_eq!(tool.info().vcpu_count, 0);
}

fn always_allowed_commands_cannot_be_disallowed(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    for id in [2, 4, 6] {
        assert_eq!(sys::command(&vm, 0, id), Err(Errno::PERM));
        assert_eq!(sys::command(&vm, 1, id), Ok(()));
        assert_eq!(sys::command(&vm, 0, id), Err(Errno::PERM));
    }
    assert_eq!(tool.version().version, 1);
}

fn unhooked_vm_has_no_masks(_: &Ctx) {
    let vm = TestVm::new();
    for allow in [0, 1] {
        for id in [-1, 2, 4, 6, 8, 12, 29] {
            assert_eq!(sys::command(&vm, allow, id), Err(Errno::FAULT), "id {id}");
        }
        for id in [-1, 0, 1, 19] {
            assert_eq!(sys::event(&vm, allow, id), Err(Errno::FAULT), "id {id}");
        }
    }
    assert_eq!(sys::preunhook(&vm), Err(Errno::FAULT));
}

/// The commands that are served and can be disallowed.
fn optional_commands() -> impl Iterator<Item = Command> {
    let all = Command::ALL.iter().copied();
    all.filter(|c| c.is_served() && c.bit() & Command::ALWAYS_ALLOWED == 0)
}

fn each_command_is_allowed_on_its_own(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    for allowed in optional_commands() {
        assert_eq!(sys::command(&vm, 1, allowed.id().into()), Ok(()));
        for command in optional_commands() {
            let expected = if command == allowed {
                Ok(())
            } else {
                Err(KvmiError::Perm)
            };
            let check = tool.check_command(command.id());
            assert_eq!(check, expected, "{command:?}, {allowed:?} allowed");
            // A range in no slot, a vCPU that does not exist: what counts is that it is looked at.
            let reply = tool.call(command, &[0; 64]);
            let refused = reply == Err(KvmiError::Perm);
            // What makes an event is also refused as long as the event is.
            let event = [Command::VmControlEvents, Command::VmPauseVcpu].contains(&command);
            assert_eq!(refused, command != allowed || event, "{command:?}");
        }
        assert_eq!(sys::command(&vm, 0, allowed.id().into()), Ok(()));
    }
}

fn disallowing_all_keeps_three_commands(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    assert!(optional_commands().all(|c| tool.check_command(c.id()).is_ok()));
    assert_eq!(sys::command(&vm, 0, -1), Ok(()));
    for command in optional_commands() {
        assert_eq!(tool.check_command(command.id()), Err(KvmiError::Perm));
    }
    for id in [2, 4, 6] {
        assert_eq!(tool.check_command(id), Ok(()));
    }
}

fn revoked_command_is_refused_at_once(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    let read = i32::from(Command::VmReadPhysical.id());
    for _ in 0..100 {
        assert_eq!(tool.read(SCRATCH, 8), Ok(vec![0; 8]));
        assert_eq!(sys::command(&vm, 0, read), Ok(()));
        assert_eq!(tool.read(SCRATCH, 8), Err(KvmiError::Perm));
        assert_eq!(sys::command(&vm, 1, read), Ok(()));
    }
}

fn check_command_tells_unserved_from_disallowed(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    let served = |id| Command::from_id(id).is_some_and(Command::is_served);
    let unserved: Vec<u16> = (0..64)
        .chain([0x100, 0x102, 0x8002, u16::MAX])
        .filter(|id| !served(*id))
        .collect();
    for allowed in [false, true] {
        if allowed {
            sys::allow_all(&vm);
        }
        for id in &unserved {
            let check = tool.check_command(*id);
            assert_eq!(check, Err(KvmiError::NoEnt), "command {id}");
        }
    }
}

fn check_event_tells_unserved_from_disallowed(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    let served = |id| Event::from_id(id).is_some_and(Event::is_served);
    for allowed in [false, true] {
        if allowed {
            sys::allow_all(&vm);
        }
        for id in (0..64).chain([0x100, 0x8000, u16::MAX]) {
            let expected = match (served(id), allowed) {
                (false, _) => Err(KvmiError::NoEnt),
                (true, false) => Err(KvmiError::Perm),
                (true, true) => Ok(()),
            };
            assert_eq!(tool.check_event(id), expected, "event {id}");
        }
    }
}

fn event_must_be_allowed_to_be_enabled(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    sys::command(&vm, 1, -1).expect("all commands can be allowed");
    for enable in [true, false] {
        let control = tool.control_event(Event::Unhook, enable);
        assert_eq!(control, Err(KvmiError::Perm));
    }
    sys::event(&vm, 1, 0).expect("the event can be allowed");
    for enable in [true, true, false, false] {
        assert_eq!(tool.control_event(Event::Unhook, enable), Ok(()));
    }
}

fn preunhook_sends_the_event_that_the_tool_enabled(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
    for seq in 1..=3 {
        assert_eq!(promptly("PREUNHOOK", || sys::preunhook(&vm)), Ok(()));
        assert_eq!(tool.unhook_event(), seq);
    }
    // It announces the end but is not the end.
    assert_eq!(tool.info().vcpu_count, 1);
    assert_eq!(sys::hook(&vm, tool.vmm_fd()), Err(Errno::EXIST));
    vm.unhook();
    tool.expect_closed();

    // Another session counts its own events.
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
    assert_eq!(sys::preunhook(&vm), Ok(()));
    assert_eq!(tool.unhook_event(), 1);
}

fn preunhook_fails_unless_the_tool_enabled_the_event(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook();
    assert_eq!(sys::preunhook(&vm), Err(Errno::NOENT));
    sys::allow_all(&vm);
    assert_eq!(sys::preunhook(&vm), Err(Errno::NOENT));
    assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
    assert_eq!(tool.control_event(Event::Unhook, false), Ok(()));
    assert_eq!(sys::preunhook(&vm), Err(Errno::NOENT));
    // No event has been sent: the reply is the first thing to arrive.
    assert_eq!(tool.version().version, 1);
}

fn preunhook_fails_when_the_event_was_revoked(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
    assert_eq!(sys::event(&vm, 0, 0), Ok(()));
    assert_eq!(sys::preunhook(&vm), Err(Errno::NOENT));
    assert_eq!(tool.version().version, 1);
}

fn preunhook_fails_when_the_tool_has_gone(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
    let _vmm_end = tool.disconnect();
    let announced = promptly("PREUNHOOK", || sys::preunhook(&vm));
    assert_eq!(announced, Err(Errno::NOENT));
    vm.unhook();
    vm.expect_usable();
}

fn preunhook_and_replies_are_never_mixed_up(ctx: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
    let rounds = ctx.rounds(2000);
    let read = range(SCRATCH, 4096);
    let payload = zerocopy::IntoBytes::as_bytes(&read);
    let (sender, _) = tool.another().into_ends();
    // The socket never gets full, since a tool that leaves no room for events may lose them.
    let (replies, events) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let wait_until_read = |sent: usize, read: &AtomicUsize| {
        while sent - read.load(Ordering::SeqCst) >= 8 {
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seq in 0..rounds {
                wait_until_read(seq, &replies);
                let message = message(Command::VmReadPhysical.id(), seq as u32, payload);
                (&sender)
                    .write_all(&message)
                    .expect("the host takes messages");
            }
        });
        scope.spawn(|| {
            for sent in 0..rounds {
                wait_until_read(sent, &events);
                assert_eq!(sys::preunhook(&vm), Ok(()));
            }
        });
        for _ in 0..2 * rounds {
            let message = tool.next();
            let seq = message.header.seq as usize;
            if message.header.id == 0 {
                assert_eq!(seq, 1 + events.fetch_add(1, Ordering::SeqCst));
                assert_eq!(message.payload, [0; 8]);
            } else {
                assert_eq!(seq, replies.fetch_add(1, Ordering::SeqCst));
                assert_eq!(message.reply(), Ok(vec![0; 4096]));
            }
        }
    });
    assert_eq!(replies.into_inner(), rounds);
    assert_eq!(events.into_inner(), rounds);
}
