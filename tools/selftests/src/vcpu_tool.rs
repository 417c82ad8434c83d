// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The tool's side of what concerns vCPUs: commands, events and replies to them.

use std::collections::VecDeque;

use kvmi_abi::{
    access::PfEvent,
    arch::{Regs, Sregs, VcpuEventArch},
    command::ControlEvents,
    event::{EventHeader, VcpuEvent},
    guest_event::NewValueReply,
    id::VCPU_EVENT,
    vcpu::{
        CpuidReply, EventReply, GetCpuid, GetRegisters, GetRegistersReply, InjectException,
        MsrEntry, PauseVcpu, TrapEvent, XcrReply,
    },
    wire::{Header, VcpuHeader},
    Action, Command, Event, KvmiError, Scope,
};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::{
    access_tool::expect_sound,
    event_common::Doing,
    guest::Mode,
    tool::{message, nothing, structure, Message, Tool},
};

/// An event of a vCPU.
#[derive(Clone, Debug)]
pub struct Paused {
    /// Its sequence number.
    pub seq: u32,
    /// Which event.
    pub event: Event,
    /// Index of the vCPU.
    pub vcpu: u16,
    /// State of the vCPU.
    pub arch: VcpuEventArch,
    /// What follows that, if it is a TRAP event.
    pub trap: Option<TrapEvent>,
    /// What follows that, if it is a PF event.
    pub pf: Option<PfEvent>,
    /// What follows that, if it is about something else that the guest does.
    pub doing: Option<Doing>,
}

impl Paused {
    /// Takes a message for an event of a vCPU; fails the test if it is not just that.
    #[track_caller]
    pub fn from(message: &Message) -> Self {
        assert_eq!(message.header.id, VCPU_EVENT, "{:?}", message.header);
        let (head, rest) = EventHeader::read_from_prefix(&message.payload).expect("a header");
        assert_eq!(head.padding, [0; 3]);
        let event = Event::from_id(head.event).expect("a known event");
        assert_eq!(event.scope(), Scope::Vcpu, "{event:?}");

        let (common, specific) = VcpuEvent::read_from_prefix(rest).expect("the common part");
        assert_eq!((common.size, common.padding), (544, 0));
        let arch = common.arch;
        assert_eq!(arch.padding, [0; 7]);
        expect_clean(&arch.sregs);
        let trap = match event {
            Event::Trap => Some(TrapEvent::read_from_bytes(specific).expect("16 bytes")),
            _ => None,
        };
        let pf = match event {
            Event::Pf => Some(PfEvent::read_from_bytes(specific).expect("24 bytes")),
            _ => None,
        };
        let doing = Doing::parse(event, specific);
        match (&trap, &pf) {
            (Some(trap), _) => assert_eq!((trap.padding1, trap.padding2), (0, 0)),
            (_, Some(pf)) => expect_sound(pf, &arch),
            _ if doing.is_some() => {}
            _ => assert_eq!(specific.len(), 0, "bytes after a {event:?} event"),
        }
        Self {
            seq: message.header.seq,
            event,
            vcpu: common.vcpu,
            arch,
            trap,
            pf,
            doing,
        }
    }

    /// The reply to it with this action.
    pub fn reply(&self, action: u8) -> EventReply {
        EventReply {
            vcpu: vcpu_header(self.vcpu),
            action,
            // Lossless: ids of events are below 20.
            event: self.event.id() as u8,
            ..Default::default()
        }
    }
}

/// Fails the test if the padding of system registers is not clean.
#[track_caller]
fn expect_clean(sregs: &Sregs) {
    let segments = [
        sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.tr, sregs.ldt,
    ];
    assert!(segments.iter().all(|segment| segment.padding == 0));
    assert_eq!((sregs.gdt.padding, sregs.idt.padding), ([0; 3], [0; 3]));
}

/// System registers as far as all CPUs agree about them: in real mode, the type of CS is what the
/// CPU likes once code has run.
pub fn comparable(mode: Mode, mut sregs: Sregs) -> Sregs {
    if mode == Mode::Real {
        sregs.cs.type_ = 0;
    }
    sregs
}

/// The first part of every vCPU message.
pub fn vcpu_header(vcpu: u16) -> VcpuHeader {
    VcpuHeader {
        vcpu,
        ..Default::default()
    }
}

/// The payload of a vCPU command.
pub fn vcpu_payload(vcpu: u16, request: &[u8]) -> Vec<u8> {
    let mut payload = vcpu_header(vcpu).as_bytes().to_vec();
    payload.extend(request);
    payload
}

/// The request of GET_REGISTERS for these MSRs.
pub fn msr_request(msrs: &[u32]) -> Vec<u8> {
    let request = GetRegisters {
        nmsrs: msrs.len().try_into().expect("a number that can be told"),
        ..Default::default()
    };
    let mut payload = request.as_bytes().to_vec();
    payload.extend(msrs.iter().flat_map(|msr| msr.to_ne_bytes()));
    payload
}

/// The request of INJECT_EXCEPTION.
pub fn exception(nr: u8, error_code: u32, address: u64) -> InjectException {
    InjectException {
        nr,
        error_code,
        address,
        ..Default::default()
    }
}

impl Tool {
    /// Sends a vCPU command; returns its sequence number.
    #[track_caller]
    pub fn send_to(&mut self, vcpu: u16, command: Command, request: &[u8]) -> u32 {
        self.send(command.id(), &vcpu_payload(vcpu, request))
    }

    /// Gives a vCPU command and waits for the reply.
    #[track_caller]
    pub fn call_vcpu(
        &mut self,
        vcpu: u16,
        command: Command,
        request: &[u8],
    ) -> Result<Vec<u8>, KvmiError> {
        let seq = self.send_to(vcpu, command, request);
        self.reply_to(command.id(), seq)
    }

    /// VCPU_GET_INFO
    #[track_caller]
    pub fn vcpu_info(&mut self, vcpu: u16) -> Result<u64, KvmiError> {
        let reply = self.call_vcpu(vcpu, Command::VcpuGetInfo, &[])?;
        Ok(u64::read_from_bytes(&reply).expect("eight bytes"))
    }

    /// VCPU_GET_REGISTERS
    #[track_caller]
    pub fn registers(
        &mut self,
        vcpu: u16,
        msrs: &[u32],
    ) -> Result<(GetRegistersReply, Vec<MsrEntry>), KvmiError> {
        let reply = self.call_vcpu(vcpu, Command::VcpuGetRegisters, &msr_request(msrs))?;
        let (head, list) = GetRegistersReply::read_from_prefix(&reply).expect("the fixed part");
        assert_eq!(usize::try_from(head.nmsrs), Ok(msrs.len()));
        assert_eq!((head.padding, head.pad), (0, 0));
        expect_clean(&head.sregs);
        let entry = |bytes| MsrEntry::read_from_bytes(bytes).expect("16 bytes");
        let list: Vec<_> = list.chunks(size_of::<MsrEntry>()).map(entry).collect();
        assert_eq!(list.len(), msrs.len());
        assert!(list.iter().all(|msr| msr.reserved == 0));
        Ok((head, list))
    }

    /// The general registers of a vCPU.
    #[track_caller]
    pub fn regs(&mut self, vcpu: u16) -> Regs {
        let reply = self.registers(vcpu, &[]);
        reply.expect("registers can be read").0.regs
    }

    /// VCPU_SET_REGISTERS
    #[track_caller]
    pub fn set_regs(&mut self, vcpu: u16, regs: &Regs) -> Result<(), KvmiError> {
        nothing(self.call_vcpu(vcpu, Command::VcpuSetRegisters, regs.as_bytes()))
    }

    /// VCPU_GET_CPUID
    #[track_caller]
    pub fn cpuid(&mut self, vcpu: u16, function: u32, index: u32) -> Result<CpuidReply, KvmiError> {
        let request = GetCpuid { function, index };
        let reply = self.call_vcpu(vcpu, Command::VcpuGetCpuid, request.as_bytes())?;
        Ok(structure(Ok(reply)))
    }

    /// VCPU_GET_XCR of XCR0
    #[track_caller]
    pub fn xcr0(&mut self, vcpu: u16) -> u64 {
        let reply: XcrReply = structure(self.call_vcpu(vcpu, Command::VcpuGetXcr, &[]));
        reply.value
    }

    /// VCPU_CONTROL_EVENTS
    #[track_caller]
    pub fn control_vcpu_event(
        &mut self,
        vcpu: u16,
        event_id: u16,
        enable: u8,
    ) -> Result<(), KvmiError> {
        let control = ControlEvents {
            event_id,
            enable,
            ..Default::default()
        };
        nothing(self.call_vcpu(vcpu, Command::VcpuControlEvents, control.as_bytes()))
    }

    /// VCPU_INJECT_EXCEPTION
    #[track_caller]
    pub fn inject(&mut self, vcpu: u16, exception: InjectException) -> Result<(), KvmiError> {
        let request = exception.as_bytes();
        nothing(self.call_vcpu(vcpu, Command::VcpuInjectException, request))
    }

    /// Sends VM_PAUSE_VCPU; returns its sequence number.
    #[track_caller]
    pub fn send_pause(&mut self, vcpu: u16, wait: bool) -> u32 {
        let request = PauseVcpu {
            vcpu,
            wait: wait.into(),
            ..Default::default()
        };
        self.send(Command::VmPauseVcpu.id(), request.as_bytes())
    }

    /// VM_PAUSE_VCPU of a vCPU that will not send its event before the reply.
    #[track_caller]
    pub fn request_pause(&mut self, vcpu: u16, wait: bool) -> Result<(), KvmiError> {
        let seq = self.send_pause(vcpu, wait);
        nothing(self.reply_to(Command::VmPauseVcpu.id(), seq))
    }

    /// Pauses a vCPU that runs.
    #[track_caller]
    pub fn pause(&mut self, vcpu: u16) -> Paused {
        self.pause_waiting(vcpu, false)
    }

    /// Pauses a vCPU that runs. Reply and event come from two threads, in any order.
    #[track_caller]
    pub fn pause_waiting(&mut self, vcpu: u16, wait: bool) -> Paused {
        let seq = self.send_pause(vcpu, wait);
        let (mut event, mut replied) = (None, false);
        while event.is_none() || !replied {
            let message = self.next();
            if message.header.id == VCPU_EVENT {
                assert!(event.is_none(), "a second event");
                event = Some(Paused::from(&message));
            } else {
                let Header { id, seq: of, .. } = message.header;
                assert_eq!((id, of), (Command::VmPauseVcpu.id(), seq));
                assert_eq!(message.reply(), Ok(vec![]));
                replied = true;
            }
        }
        let event = event.expect("the loop has ended");
        assert_eq!((event.vcpu, event.event), (vcpu, Event::Pause));
        event
    }

    /// Receives an event of a vCPU.
    #[track_caller]
    pub fn vcpu_event(&mut self, vcpu: u16, event: Event) -> Paused {
        let paused = Paused::from(&self.next());
        assert_eq!((paused.vcpu, paused.event), (vcpu, event));
        paused
    }

    /// Replies to an event; a register gets what the guest writes.
    #[track_caller]
    pub fn answer(&mut self, event: &Paused, action: Action) {
        self.answer_value(event, action, event.doing.and_then(Doing::new_value));
    }

    /// Replies to an event, with what a register gets.
    #[track_caller]
    pub fn answer_value(&mut self, event: &Paused, action: Action, value: Option<u64>) {
        let mut reply = event.reply(action.code()).as_bytes().to_vec();
        let value = value.map(|new_val| NewValueReply { new_val });
        reply.extend(value.iter().flat_map(|value| value.as_bytes()));
        self.send_raw(&message(VCPU_EVENT, event.seq, &reply));
    }

    /// Lets a vCPU go on after an event.
    #[track_caller]
    pub fn resume(&mut self, event: &Paused) {
        self.answer(event, Action::Continue);
    }

    /// Makes sure that the host has taken everything sent so far.
    #[track_caller]
    pub fn settle(&mut self) {
        let seq = self.send(Command::GetVersion.id(), &[]);
        assert!(self.reply_to(Command::GetVersion.id(), seq).is_ok());
    }
}

/// Commands without a reply so far, each in the order in which it must be answered: that of its
/// vCPU's commands, or of the VM's.
#[derive(Default)]
pub struct Ledger(Vec<(Option<u16>, Queue)>);

/// Ids and sequence numbers of commands.
type Queue = VecDeque<(u16, u32)>;

impl Ledger {
    /// A command was sent: to this vCPU, or to the VM.
    pub fn sent(&mut self, vcpu: Option<u16>, id: u16, seq: u32) {
        match self.0.iter_mut().find(|(whose, _)| *whose == vcpu) {
            Some((_, queue)) => queue.push_back((id, seq)),
            None => self.0.push((vcpu, [(id, seq)].into())),
        }
    }

    /// Fails the test unless a reply is the next one of a vCPU or of the VM; returns of which.
    #[track_caller]
    pub fn replied(&mut self, header: &Header) -> Option<u16> {
        let this = (header.id, header.seq);
        for (whose, queue) in &mut self.0 {
            if queue.front() == Some(&this) {
                queue.pop_front();
                return *whose;
            }
        }
        panic!("a reply without a command, or out of order: {header:?}");
    }

    /// Commands without a reply.
    pub fn len(&self) -> usize {
        self.0.iter().map(|(_, queue)| queue.len()).sum()
    }

    /// Whether all have been replied to.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
