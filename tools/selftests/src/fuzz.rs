// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Random messages and mask changes, checked against a model.
//!
//! The model is the code of the shared crate that the module runs, plus a copy of the guest's
//! memory, so that every answer is known beforehand: what is tested is all around that code.

use std::collections::VecDeque;

use kvmi_abi::{
    access::{PageAccess, PageList, R, X},
    ioctl::Feature,
    policy::{FeatureError, MaskChange},
    wire::Header,
    Event, KvmiError, Policy, Reject, Request, VcpuRequest,
};
use zerocopy::IntoBytes as _;

use crate::{
    fuzz_messages::random_message,
    harness::{note, test, Ctx, Test},
    sys::{self, Errno},
    tool::{message, message_announcing, Tool},
    util::Rng,
    vcpu_fuzz::Expectation,
    vm::{Guest, TestVm, MEMORY, SCRATCH},
};

const AREA: &str = "fuzz";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(random_messages_get_the_answers_of_the_model)
        .long()
        .destructive(),
    test!(random_bytes_only_end_the_connection)
        .long()
        .destructive(),
];

/// What the host must do about a message.
enum Answer {
    /// This reply.
    Reply(Result<Vec<u8>, KvmiError>),
    /// A successful reply with this many bytes.
    Success(usize),
    /// A reply of a vCPU.
    Vcpu(Expectation),
    /// The end of the connection.
    End,
}

/// Whether a vCPU sends events because of a command.
fn makes_events(request: &Result<VcpuRequest<'_>, KvmiError>) -> bool {
    match request {
        Ok(VcpuRequest::InjectException(_)) => true,
        Ok(VcpuRequest::ControlEvents { event, enable }) => *event == Event::Pf && *enable,
        _ => false,
    }
}

/// The answer to SET_PAGE_ACCESS; `None` if it depends on the CPU.
fn set_access(list: PageList<'_>) -> Option<Answer> {
    if list.pages().any(|page| page.access == X) {
        return None;
    }
    let possible = |page: PageAccess| {
        page.denied().is_some()
            && (page.access == 0 || page.access & R != 0)
            && page.gpa < MEMORY as u64
    };
    Some(Answer::Reply(if list.pages().all(possible) {
        Ok(vec![])
    } else {
        Err(KvmiError::Inval)
    }))
}

/// What is known about a session.
struct Model {
    policy: Policy,
    /// The guest's memory from [`SCRATCH`] to [`MEMORY`].
    memory: Vec<u8>,
    vcpus: u8,
}

impl Model {
    /// The answer to a message; `None` if the guest would not survive it, or if it would make an
    /// event, which is the subject of another test.
    fn answer(&mut self, header: &Header, payload: &[u8]) -> Option<Answer> {
        if header.payload_len().is_none() {
            return Some(Answer::End);
        }
        let request = match Request::parse(header, payload, &self.policy) {
            Ok(request) => request,
            Err(Reject::Reply(error)) => return Some(Answer::Reply(Err(error))),
            Err(Reject::Close(_)) => return Some(Answer::End),
        };
        Some(Answer::Reply(match request {
            Request::GetVersion => return Some(Answer::Success(16)),
            Request::GetInfo => {
                let mut info = vec![0; 16];
                info[0] = self.vcpus;
                Ok(info)
            }
            Request::CheckCommand(id) => self.policy.check_command(id).map(|()| vec![]),
            Request::CheckEvent(id) => self.policy.check_event(id).map(|()| vec![]),
            Request::ControlEvents { .. } | Request::ControlCleanup { .. } => Ok(vec![]),
            Request::ReadPhysical { gpa, len } => match place(gpa) {
                Place::Scratch(at) => Ok(self.memory[at..at + len].to_vec()),
                Place::Code => return Some(Answer::Success(len)),
                Place::Nowhere => Err(KvmiError::NoEnt),
            },
            Request::WritePhysical { gpa, data } => match place(gpa) {
                Place::Scratch(at) => {
                    self.memory[at..at + data.len()].copy_from_slice(data);
                    Ok(vec![])
                }
                Place::Code => return None,
                Place::Nowhere => Err(KvmiError::NoEnt),
            },
            Request::SetPageAccess(list) => return set_access(list),
            Request::PauseVcpu { vcpu, .. } if vcpu < self.vcpus.into() => return None,
            Request::PauseVcpu { .. } => Err(KvmiError::Inval),
            Request::Vcpu(message) if message.vcpu >= self.vcpus.into() => Err(KvmiError::Inval),
            Request::Vcpu(message) => {
                let request = VcpuRequest::parse(message.command, message.payload, &self.policy);
                if makes_events(&request) {
                    return None;
                }
                return Some(Answer::Vcpu(Expectation::of(&request, false)));
            }
            // It depends on the time.
            Request::GetMapToken { .. } => return None,
            // No vCPU waits for one.
            Request::EventReply(_) => return Some(Answer::End),
        }))
    }

    /// Changes a mask of the session and of the model, which must agree about it.
    fn change_mask(&mut self, vm: &TestVm, rng: &mut Rng) {
        let feature = Feature {
            allow: rng.pick(&[0, 1, 1, 1, 2]),
            id: rng.pick(&[
                -1,
                -2,
                0,
                1,
                2,
                3,
                5,
                7,
                8,
                9,
                10,
                12,
                14,
                15,
                16,
                18,
                20,
                24,
                29,
                31,
                0x7fff_ffff,
            ]),
        };
        let events = rng.one_in(3);
        let (real, expected) = if events {
            let change = MaskChange::of_events(&feature);
            let changed = change.map(|change| self.policy.change_events(change));
            (sys::event(vm, feature.allow, feature.id), changed)
        } else {
            let change = MaskChange::of_commands(&feature);
            let changed = change.and_then(|change| self.policy.change_commands(change));
            (sys::command(vm, feature.allow, feature.id), changed)
        };
        let expected = expected.map_err(|error| match error {
            FeatureError::Invalid => Errno::INVAL,
            FeatureError::AlwaysAllowed => Errno::PERM,
        });
        assert_eq!(real, expected, "{feature:?}, of events: {events}");
    }
}

/// What an address of the guest is good for.
enum Place {
    /// Memory that the guest does not use, at this offset from [`SCRATCH`].
    Scratch(usize),
    /// Memory that the guest uses.
    Code,
    /// No memory.
    Nowhere,
}

fn place(gpa: u64) -> Place {
    match usize::try_from(gpa) {
        Ok(gpa) if gpa >= MEMORY => Place::Nowhere,
        Ok(gpa) => match gpa.checked_sub(SCRATCH as usize) {
            Some(offset) => Place::Scratch(offset),
            None => Place::Code,
        },
        Err(_) => Place::Nowhere,
    }
}

/// Fails the test unless the host answers as expected.
#[track_caller]
fn expect(tool: &mut Tool, (header, answer): (Header, Answer)) {
    let mut reply = || {
        let message = tool.next();
        assert_eq!(
            (message.header.id, message.header.seq),
            (header.id, header.seq)
        );
        message.reply()
    };
    match answer {
        // Not assert_eq: nobody wants to read two pages of memory.
        Answer::Reply(Ok(expected)) => {
            let data = reply().unwrap_or_else(|error| panic!("{header:?} fails: {error}"));
            assert!(
                data == expected,
                "the data in reply to {header:?} are wrong"
            );
        }
        Answer::Reply(expected) => assert_eq!(reply(), expected, "{header:?}"),
        Answer::Success(len) => assert_eq!(reply().map(|data| data.len()), Ok(len)),
        Answer::Vcpu(expectation) => expectation.check(&header, reply()),
        Answer::End => tool.expect_closed(),
    }
}

fn random_messages_get_the_answers_of_the_model(ctx: &Ctx) {
    note!("seed {}", ctx.seed());
    let mut rng = ctx.rng();
    let vm = TestVm::counting(2);
    let mut model = Model {
        policy: Policy::default(),
        memory: vec![0; MEMORY - SCRATCH as usize],
        vcpus: 2,
    };
    let mut tool = vm.hook();
    // Few enough to fit in the socket's buffers: replies are at most a page.
    let mut pending = VecDeque::new();
    let (mut sessions, mut sent) = (1, 0);
    let messages = ctx.rounds(50_000);
    while sent < messages {
        if pending.len() == 8 || rng.one_in(6) {
            for answer in pending.drain(..) {
                expect(&mut tool, answer);
            }
            // With nothing under way, it is clear which messages a change concerns.
            if rng.one_in(4) {
                model.change_mask(&vm, &mut rng);
            }
        }
        let (id, size, payload) = random_message(&mut rng);
        let header = Header {
            id,
            size,
            seq: sent as u32,
        };
        let Some(answer) = model.answer(&header, &payload) else {
            continue;
        };
        // Replies of vCPUs may overtake others, or get lost at the end.
        let alone = matches!(answer, Answer::Vcpu(_));
        if alone {
            for answer in pending.drain(..) {
                expect(&mut tool, answer);
            }
        }
        let last = matches!(answer, Answer::End);
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(payload);
        tool.send_raw(&bytes);
        sent += 1;
        pending.push_back((header, answer));
        if alone {
            for answer in pending.drain(..) {
                expect(&mut tool, answer);
            }
        }
        if last {
            for answer in pending.drain(..) {
                expect(&mut tool, answer);
            }
            assert_eq!(sys::hook(&vm, tool.vmm_fd()), Err(Errno::EXIST));
            vm.unhook();
            tool = vm.hook();
            sessions += 1;
            model.policy = Policy::default();
            while !rng.one_in(4) {
                model.change_mask(&vm, &mut rng);
            }
        }
    }
    for answer in pending {
        expect(&mut tool, answer);
    }
    note!("{sent} messages in {sessions} sessions");
    let memory = vm.memory.read(SCRATCH, model.memory.len());
    assert!(
        memory == model.memory,
        "the guest's memory is not as written"
    );
    vm.unhook();
    vm.expect_usable();
}

fn random_bytes_only_end_the_connection(ctx: &Ctx) {
    note!("seed {}", ctx.seed());
    let mut rng = ctx.rng();
    // It survives an exception: a message with zeros at the right places may inject one.
    let vm = TestVm::running(Guest::Count64, 1);
    for _ in 0..ctx.rounds(1000) {
        // Writing to guest memory is not what this is about.
        let mut tool = vm.hook_allowing_all();
        sys::command(&vm, 0, 14).expect("a command can be disallowed");
        for _ in 0..rng.below(4) {
            let len = 1 + rng.below(200);
            let bytes = match rng.below(3) {
                0 => rng.bytes(len),
                // A header to begin with, whose size is right, or not.
                1 => message(rng.below(32) as u16, 1, &rng.bytes(len)),
                _ => message_announcing(rng.below(32) as u16, rng.next() as u16, &[1; 40]),
            };
            // The host may have hung up already.
            let _ = tool.try_send_raw(&bytes);
        }
        if rng.one_in(2) {
            tool.finish_sending();
            tool.drain();
        }
        vm.unhook();
        tool.drain();
    }
    vm.expect_usable();
}
