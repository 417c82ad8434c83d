// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Random vCPU messages to vCPUs that run or wait for a reply, checked against what the shared
//! crate says about their arguments.

use kvmi_abi::{
    arch::Regs,
    command::ControlEvents,
    guest_control::{ControlCr, ControlMsr},
    id::VCPU_EVENT,
    ioctl::Feature,
    policy::MaskChange,
    vcpu::{GetCpuid, PauseVcpu, XSAVE_SIZE},
    wire::{Header, VcpuHeader},
    Command, Event, KvmiError, Policy, Scope, VcpuRequest,
};
use zerocopy::IntoBytes as _;

use crate::{
    harness::{note, test, Ctx, Test},
    tool::Tool,
    util::Rng,
    vcpu_tool::{exception, msr_request, vcpu_payload, Ledger, Paused},
    vm::{Guest, TestVm},
};

const AREA: &str = "vcpu_fuzz";

/// The tests of this file.
pub const TESTS: &[Test] = &[test!(random_vcpu_messages_get_the_answers_of_the_model)
    .long()
    .destructive()];

/// What a vCPU may answer.
#[derive(Debug)]
pub struct Expectation {
    /// How many bytes a success has, if it is possible.
    success: Option<usize>,
    /// Which errors are possible.
    errors: &'static [KvmiError],
}

impl Expectation {
    /// What may be the answer to a request, or to a message that makes none; `waiting` tells
    /// whether the vCPU waits for a reply.
    pub fn of(request: &Result<VcpuRequest<'_>, KvmiError>, waiting: bool) -> Self {
        let may = |success, errors| Self {
            success: Some(success),
            errors,
        };
        let only = |errors| Self {
            success: None,
            errors,
        };
        match request {
            Err(KvmiError::Perm) => only(&[KvmiError::Perm]),
            Err(KvmiError::NoSys) => only(&[KvmiError::NoSys]),
            Err(_) => only(&[KvmiError::Inval]),
            Ok(VcpuRequest::SetRegisters(_)) if !waiting => only(&[KvmiError::OpNotSupp]),
            Ok(VcpuRequest::SetRegisters(_)) => may(0, &[]),
            // Not every CPU can do that.
            Ok(
                VcpuRequest::ControlEvents {
                    event: Event::Descriptor,
                    ..
                }
                | VcpuRequest::ControlSinglestep(_),
            ) => may(0, &[KvmiError::OpNotSupp]),
            Ok(
                VcpuRequest::ControlEvents { .. }
                | VcpuRequest::ControlCr { .. }
                | VcpuRequest::ControlMsr { .. },
            ) => may(0, &[]),
            Ok(VcpuRequest::GetRegisters(msrs)) if msrs.is_empty() => may(472, &[]),
            Ok(VcpuRequest::GetRegisters(msrs)) => may(472 + 16 * msrs.len(), &[KvmiError::Inval]),
            Ok(VcpuRequest::GetCpuid(_)) => may(16, &[KvmiError::NoEnt]),
            Ok(VcpuRequest::InjectException(_)) => may(0, &[KvmiError::Inval, KvmiError::Busy]),
            Ok(VcpuRequest::GetXsave) => may(XSAVE_SIZE, &[]),
            Ok(VcpuRequest::SetXsave(_)) => may(0, &[KvmiError::Inval]),
            Ok(
                VcpuRequest::GetInfo
                | VcpuRequest::GetXcr0
                | VcpuRequest::GetMtrrType(_)
                | VcpuRequest::TranslateGva(_),
            ) => may(8, &[]),
        }
    }

    /// Fails the test if it is answered in another way.
    #[track_caller]
    pub fn check(&self, header: &Header, reply: Result<Vec<u8>, KvmiError>) {
        let fine = match &reply {
            Ok(data) => self.success == Some(data.len()),
            Err(error) => self.errors.contains(error),
        };
        let reply = reply.map(|data| data.len());
        assert!(fine, "{header:?}: {reply:?} bytes instead of {self:?}");
    }
}

/// The request of a vCPU command, valid more or less.
pub fn vcpu_request(rng: &mut Rng, command: Command) -> Vec<u8> {
    let mut request = match command {
        Command::VcpuGetRegisters => {
            let msrs: Vec<u32> = (0..rng.below(8))
                .map(|_| rng.pick(&[0x10, 0x174, 0x277, 0xc000_0080, 0xc000_0082, 0xdead]))
                .collect();
            msr_request(&msrs)
        }
        Command::VcpuControlEvents => {
            let any = rng.below(20) as u16;
            let control = ControlEvents {
                event_id: rng.pick(&[1, 9, any]),
                enable: rng.below(2) as u8,
                ..Default::default()
            };
            control.as_bytes().to_vec()
        }
        Command::VcpuGetCpuid => {
            let leaf = GetCpuid {
                function: rng.pick(&[0, 1, 7, 0xd, 0x4000_0000, 0x8000_0008, 0x1234]),
                index: rng.below(3) as u32,
            };
            leaf.as_bytes().to_vec()
        }
        Command::VcpuInjectException => {
            let nr = rng.below(34) as u8;
            let error_code = if nr == 8 { 0 } else { rng.below(32) as u32 };
            exception(nr, error_code, rng.next()).as_bytes().to_vec()
        }
        Command::VcpuControlCr => {
            let control = ControlCr {
                cr: rng.pick(&[0, 3, 4, 8]),
                enable: rng.below(2) as u8,
                ..Default::default()
            };
            control.as_bytes().to_vec()
        }
        Command::VcpuControlMsr => {
            let control = ControlMsr {
                enable: rng.below(2) as u8,
                msr: rng.pick(&[0x174, 0x277, 0xc000_0082, 0x2000, 0x4000_0000]),
                ..Default::default()
            };
            control.as_bytes().to_vec()
        }
        Command::VcpuControlSinglestep => vec![rng.below(2) as u8],
        Command::VcpuGetXcr => vec![0; 8],
        Command::VcpuSetRegisters => vec![0; size_of::<Regs>()],
        Command::VcpuSetXsave => vec![0; XSAVE_SIZE],
        Command::VcpuGetMtrrType | Command::VcpuTranslateGva => rng.bytes(8),
        _ => vec![],
    };
    match rng.below(8) {
        // Some bits are wrong.
        0 => {
            for _ in 0..=rng.below(3) {
                let bit = rng.below(8 * request.len().max(1));
                if let Some(byte) = request.get_mut(bit / 8) {
                    *byte ^= 1 << (bit % 8);
                }
            }
        }
        // Something is missing, or too much.
        1 => request.truncate(rng.below(request.len() + 1)),
        2 => request.extend(rng.bytes(64)),
        _ => {}
    }
    request
}

/// Everything that is allowed.
fn everything() -> Policy {
    let all = Feature { allow: 1, id: -1 };
    let mut policy = Policy::default();
    let commands = MaskChange::of_commands(&all).expect("all can be allowed");
    policy
        .change_commands(commands)
        .expect("all can be allowed");
    policy.change_events(MaskChange::of_events(&all).expect("all can be allowed"));
    policy
}

/// What is known about a session.
struct Model {
    tool: Tool,
    rng: Rng,
    policy: Policy,
    ledger: Ledger,
    expected: Vec<(u32, Expectation)>,
    /// Events without a reply so far.
    held: Vec<Paused>,
    events: usize,
}

impl Model {
    /// Receives one message: a reply that must be right, or an event to be held for a while.
    #[track_caller]
    fn receive(&mut self) {
        let message = self.tool.next();
        if message.header.id == VCPU_EVENT {
            let event = Paused::from(&message);
            let expected = matches!(event.event, Event::Pause | Event::Trap | Event::Singlestep);
            assert!(expected, "{event:?}");
            let same = self.held.iter().any(|held| held.vcpu == event.vcpu);
            assert!(!same, "two events of vCPU {} at once", event.vcpu);
            self.held.push(event);
            self.events += 1;
            return;
        }
        let header = message.header;
        self.ledger.replied(&header);
        let nth = self.expected.iter().position(|(seq, _)| *seq == header.seq);
        let (_, expectation) = self.expected.swap_remove(nth.expect("it was noted"));
        expectation.check(&header, message.reply());
    }

    /// Replies to one of the events.
    fn release(&mut self) {
        if !self.held.is_empty() {
            let event = self.held.swap_remove(self.rng.below(self.held.len()));
            self.tool.resume(&event);
        }
    }

    /// Sends a random message; sometimes one that is not for a vCPU that exists.
    #[track_caller]
    fn send(&mut self, vcpus: u16) {
        let (rng, absent) = (&mut self.rng, [vcpus, 0x100, u16::MAX]);
        let exists = !rng.one_in(16);
        let vcpu = if exists {
            rng.below(vcpus.into()) as u16
        } else {
            rng.pick(&absent)
        };
        if rng.one_in(12) {
            let pause = PauseVcpu {
                vcpu,
                wait: rng.below(2) as u8,
                ..Default::default()
            };
            let seq = self.tool.send(Command::VmPauseVcpu.id(), pause.as_bytes());
            let expectation = Expectation {
                success: exists.then_some(0),
                errors: if exists { &[] } else { &[KvmiError::Inval] },
            };
            self.ledger.sent(None, Command::VmPauseVcpu.id(), seq);
            self.expected.push((seq, expectation));
            return;
        }
        let command = rng.pick(Command::ALL);
        if command.scope() != Scope::Vcpu || !command.is_served() {
            return;
        }
        let mut request = vcpu_request(rng, command);
        let held = self.held.iter().find(|event| event.vcpu == vcpu);
        if command == Command::VcpuSetRegisters && request.len() >= size_of::<Regs>() {
            // The guest survives its own registers only; that it waits is certain only now.
            let Some(held) = held else { return };
            request[..size_of::<Regs>()].copy_from_slice(held.arch.regs.as_bytes());
        }
        let parsed = VcpuRequest::parse(command, &request, &self.policy);
        let mut expectation = Expectation::of(&parsed, held.is_some());
        let mut payload = vcpu_payload(vcpu, &request);
        let padded = rng.one_in(32);
        if padded {
            payload[2 + rng.below(size_of::<VcpuHeader>() - 2)] ^= 1 << rng.below(8);
        }
        let refused = padded || !exists;
        if refused {
            (expectation.success, expectation.errors) = (None, &[KvmiError::Inval]);
        }
        let seq = self.tool.send(command.id(), &payload);
        self.ledger
            .sent((!refused).then_some(vcpu), command.id(), seq);
        self.expected.push((seq, expectation));
    }
}

fn random_vcpu_messages_get_the_answers_of_the_model(ctx: &Ctx) {
    const VCPUS: u16 = 3;
    note!("seed {}", ctx.seed());
    let vm = TestVm::running(Guest::Count64, VCPUS.into());
    let mut model = Model {
        tool: vm.hook_allowing_all(),
        rng: ctx.rng(),
        policy: everything(),
        ledger: Ledger::default(),
        expected: vec![],
        held: vec![],
        events: 0,
    };
    let messages = ctx.rounds(30_000);
    for _ in 0..messages {
        model.send(VCPUS);
        // Few enough to fit in the socket's buffers.
        while model.ledger.len() > 8 || (!model.ledger.is_empty() && model.rng.one_in(3)) {
            model.receive();
        }
        if model.rng.one_in(4) {
            model.release();
        }
    }
    while !model.ledger.is_empty() {
        model.receive();
    }
    note!("{} events", model.events);
    vm.unhook();
    model.tool.drain();
    vm.expect_progress();
    vm.expect_usable();
}
