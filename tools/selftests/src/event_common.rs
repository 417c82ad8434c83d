// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The tool's side of what the guest does by itself: it chooses what it is told, and decides.

use std::{thread, time::Instant};

use kvmi_abi::{
    command::ControlEvents,
    guest_control::{ControlCr, ControlMsr, ControlSinglestep},
    guest_event::{
        BreakpointEvent, Cr, CrEvent, DescriptorEvent, DescriptorRegister, MsrEvent,
        SinglestepEvent, XsetbvEvent,
    },
    Action, Command, Event, KvmiError,
};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::{
    tool::{nothing, Tool},
    util::soon,
    vcpu::{Exit, Vcpu},
    vcpu_tool::Paused,
};

/// What the guest is about to do, or has done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Doing {
    /// It writes a control register.
    Cr { cr: Cr, old: u64, new: u64 },
    /// It writes an MSR.
    Msr { msr: u32, old: u64, new: u64 },
    /// It writes XCR0.
    Xsetbv { old: u64, new: u64 },
    /// It executes an INT3 of this length.
    Breakpoint { gpa: u64, insn_len: u8 },
    /// It calls the tool.
    Hypercall,
    /// It loads or stores a descriptor-table register.
    Descriptor {
        register: DescriptorRegister,
        load: bool,
    },
    /// It has executed an instruction.
    Step { failed: bool },
}

impl Doing {
    /// Takes what is specific to an event; fails the test if it is not sound. Gives `None` for
    /// events of another kind.
    #[track_caller]
    pub fn parse(event: Event, specific: &[u8]) -> Option<Self> {
        const SIZE: &str = "the size of the structure";
        Some(match event {
            Event::Cr => {
                let cr = CrEvent::read_from_bytes(specific).expect(SIZE);
                assert_eq!(cr.padding, [0; 7]);
                assert_ne!(cr.old_value, cr.new_value);
                Self::Cr {
                    cr: Cr::from_number(cr.cr).expect("one that can be chosen"),
                    old: cr.old_value,
                    new: cr.new_value,
                }
            }
            Event::Msr => {
                let msr = MsrEvent::read_from_bytes(specific).expect(SIZE);
                assert_eq!(msr.padding, 0);
                assert_ne!(msr.old_value, msr.new_value);
                Self::Msr {
                    msr: msr.msr,
                    old: msr.old_value,
                    new: msr.new_value,
                }
            }
            Event::Xsetbv => {
                let xcr = XsetbvEvent::read_from_bytes(specific).expect(SIZE);
                assert_eq!((xcr.xcr, xcr.padding), (0, [0; 7]));
                assert_ne!(xcr.old_value, xcr.new_value);
                Self::Xsetbv {
                    old: xcr.old_value,
                    new: xcr.new_value,
                }
            }
            Event::Breakpoint => {
                let breakpoint = BreakpointEvent::read_from_bytes(specific).expect(SIZE);
                assert_eq!(breakpoint.padding, [0; 7]);
                Self::Breakpoint {
                    gpa: breakpoint.gpa,
                    insn_len: breakpoint.insn_len,
                }
            }
            Event::Hypercall => {
                assert_eq!(specific.len(), 0);
                Self::Hypercall
            }
            Event::Descriptor => {
                let access = DescriptorEvent::read_from_bytes(specific).expect(SIZE);
                assert_eq!(access.padding, [0; 6]);
                assert!(access.write <= 1);
                let register = DescriptorRegister::from_number(access.descriptor);
                Self::Descriptor {
                    register: register.expect("one of the four"),
                    load: access.write == 1,
                }
            }
            Event::Singlestep => {
                let step = SinglestepEvent::read_from_bytes(specific).expect(SIZE);
                assert_eq!(step.padding, [0; 7]);
                assert!(step.failed <= 1);
                Self::Step {
                    failed: step.failed == 1,
                }
            }
            _ => return None,
        })
    }

    /// What the guest writes, if the reply decides about it.
    pub fn new_value(self) -> Option<u64> {
        match self {
            Self::Cr { new, .. } | Self::Msr { new, .. } => Some(new),
            _ => None,
        }
    }

    /// The event that tells this.
    pub fn event(self) -> Event {
        match self {
            Self::Cr { .. } => Event::Cr,
            Self::Msr { .. } => Event::Msr,
            Self::Xsetbv { .. } => Event::Xsetbv,
            Self::Breakpoint { .. } => Event::Breakpoint,
            Self::Hypercall => Event::Hypercall,
            Self::Descriptor { .. } => Event::Descriptor,
            Self::Step { .. } => Event::Singlestep,
        }
    }
}

/// A step that ended as it should.
pub const STEP: Doing = Doing::Step { failed: false };

/// Something that a tool wants to be told.
#[derive(Clone, Copy, Debug)]
pub enum Wish {
    /// Writes of this control register.
    Cr(Cr),
    /// Writes of this MSR.
    Msr(u32),
    /// What this event tells.
    Event(Event),
    /// Each instruction.
    Step,
}

impl Wish {
    /// The commands that say so, or that it is no longer wanted.
    fn commands(self, enable: bool) -> Vec<(Command, Vec<u8>)> {
        let event = |event| {
            let request = control_event(event, enable).as_bytes().to_vec();
            (Command::VcpuControlEvents, request)
        };
        let enable = enable.into();
        match self {
            Self::Cr(cr) => {
                let request = control_cr(cr.number(), enable).as_bytes().to_vec();
                vec![event(Event::Cr), (Command::VcpuControlCr, request)]
            }
            Self::Msr(msr) => {
                let request = control_msr(msr, enable).as_bytes().to_vec();
                vec![event(Event::Msr), (Command::VcpuControlMsr, request)]
            }
            Self::Event(id) => vec![event(id)],
            Self::Step => {
                let request = control_step(enable).as_bytes().to_vec();
                vec![(Command::VcpuControlSinglestep, request)]
            }
        }
    }
}

/// The request of VCPU_CONTROL_EVENTS.
pub fn control_event(event: Event, enable: bool) -> ControlEvents {
    ControlEvents {
        event_id: event.id(),
        enable: enable.into(),
        ..Default::default()
    }
}

/// The request of VCPU_CONTROL_CR.
pub fn control_cr(cr: u8, enable: u8) -> ControlCr {
    ControlCr {
        cr,
        enable,
        ..Default::default()
    }
}

/// The request of VCPU_CONTROL_MSR.
pub fn control_msr(msr: u32, enable: u8) -> ControlMsr {
    ControlMsr {
        msr,
        enable,
        ..Default::default()
    }
}

/// The request of VCPU_CONTROL_SINGLESTEP.
pub fn control_step(enable: u8) -> ControlSinglestep {
    ControlSinglestep {
        enable,
        ..Default::default()
    }
}

impl Tool {
    /// VCPU_CONTROL_CR
    #[track_caller]
    pub fn control_cr(&mut self, vcpu: u16, cr: u8, enable: u8) -> Result<(), KvmiError> {
        let request = control_cr(cr, enable);
        nothing(self.call_vcpu(vcpu, Command::VcpuControlCr, request.as_bytes()))
    }

    /// VCPU_CONTROL_MSR
    #[track_caller]
    pub fn control_msr(&mut self, vcpu: u16, msr: u32, enable: u8) -> Result<(), KvmiError> {
        let request = control_msr(msr, enable);
        nothing(self.call_vcpu(vcpu, Command::VcpuControlMsr, request.as_bytes()))
    }

    /// VCPU_CONTROL_SINGLESTEP
    #[track_caller]
    pub fn control_step(&mut self, vcpu: u16, enable: u8) -> Result<(), KvmiError> {
        let request = control_step(enable);
        nothing(self.call_vcpu(vcpu, Command::VcpuControlSinglestep, request.as_bytes()))
    }

    /// Says what is wanted of a vCPU that executes commands and sends no events meanwhile, or what
    /// is not wanted any more.
    #[track_caller]
    pub fn wish(&mut self, vcpu: u16, wishes: &[Wish], enable: bool) {
        for (command, request) in wishes.iter().flat_map(|wish| wish.commands(enable)) {
            let reply = self.call_vcpu(vcpu, command, &request);
            assert_eq!(nothing(reply), Ok(()), "{command:?} {request:?}");
        }
    }

    /// Sends that something is wanted, or not any more; returns which commands these are, each with
    /// its sequence number.
    #[track_caller]
    pub fn send_wish(&mut self, vcpu: u16, wish: Wish, enable: bool) -> Vec<(Command, u32)> {
        let commands = wish.commands(enable).into_iter();
        commands
            .map(|(command, request)| (command, self.send_to(vcpu, command, &request)))
            .collect()
    }

    /// Sends what is wanted; returns which commands these are, each with its sequence number.
    #[track_caller]
    pub fn send_wishes(&mut self, vcpu: u16, wishes: &[Wish]) -> Vec<(Command, u32)> {
        let wishes = wishes.iter();
        wishes
            .flat_map(|wish| self.send_wish(vcpu, *wish, true))
            .collect()
    }

    /// Lets a vCPU run, of which this is wanted from its first instruction on.
    #[track_caller]
    pub fn run_telling(&mut self, vcpu: &mut Vcpu, wishes: &[Wish]) {
        let sent = self.send_wishes(vcpu.index, wishes);
        self.settle();
        vcpu.run();
        for (command, seq) in sent {
            let reply = self.reply_to(command.id(), seq);
            assert_eq!(nothing(reply), Ok(()), "{command:?}");
        }
    }

    /// Receives an event; fails the test unless it tells this.
    #[track_caller]
    pub fn expect(&mut self, vcpu: u16, doing: Doing) -> Paused {
        let event = self.vcpu_event(vcpu, doing.event());
        let rip = event.arch.regs.rip;
        assert_eq!(
            format!("{:x?}", event.doing),
            format!("{:x?}", Some(doing)),
            "at {rip:#x}"
        );
        event
    }

    /// Receives these events, and has the vCPU go on after each as the guest wants.
    #[track_caller]
    pub fn let_pass(&mut self, vcpu: u16, all: &[Doing]) {
        for doing in all {
            let event = self.expect(vcpu, *doing);
            self.resume(&event);
        }
    }

    /// Has a register get another value than the guest writes.
    #[track_caller]
    pub fn replace(&mut self, event: &Paused, value: u64) {
        self.answer_value(event, Action::Continue, Some(value));
    }

    /// Has the vCPU go on as the guest wants, whatever is told, until `KVM_RUN` returns; returns
    /// how many events there were.
    #[track_caller]
    pub fn let_all_pass(&mut self, vcpu: &mut Vcpu) -> u64 {
        let mut events = 0;
        let mut last = Instant::now();
        while !vcpu.has_exited() {
            if self.readable() == 0 {
                assert!(last.elapsed() < soon(), "the guest does not go on");
                thread::yield_now();
                continue;
            }
            last = Instant::now();
            let event = Paused::from(&self.next());
            assert_eq!(event.vcpu, vcpu.index);
            assert_ne!(event.doing, Some(Doing::Step { failed: true }));
            self.resume(&event);
            events += 1;
        }
        events
    }

    /// Lets the guest get to the end of its code without another event.
    #[track_caller]
    pub fn expect_end(&mut self, vcpu: &mut Vcpu) {
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        // An event would have come before this reply.
        self.settle();
    }

    /// Runs a vCPU to the end of its code; fails the test unless just these events are sent.
    #[track_caller]
    pub fn expect_events(&mut self, vcpu: &mut Vcpu, wishes: &[Wish], all: &[Doing]) {
        self.run_telling(vcpu, wishes);
        self.let_pass(vcpu.index, all);
        self.expect_end(vcpu);
    }
}

/// Replies with an action that is not for this event: the connection is closed, and the guest gets
/// to its end as if nobody had been asked.
#[track_caller]
pub fn expect_refused(mut tool: Tool, vcpu: &mut Vcpu, event: &Paused, action: Action) {
    tool.answer(event, action);
    tool.expect_closed();
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
}

/// Ends the vCPU with an event: nothing of the instruction is done.
#[track_caller]
pub fn expect_crash(tool: &mut Tool, vcpu: &mut Vcpu, event: &Paused) {
    let regs = event.arch.regs;
    tool.answer(event, Action::Crash);
    assert_eq!(vcpu.exit(), Exit::Shutdown);
    assert_eq!(vcpu.regs().rip, regs.rip);
    tool.settle();
}
