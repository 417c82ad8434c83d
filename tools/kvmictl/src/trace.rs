// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl trace`

mod happening;
mod late;
mod report;

use std::{ops::Range, os::fd::OwnedFd, time::Instant};

use anyhow::Result;
use kvmi_client::{symbols::Symbols, Action, Connection, Error, EventId, VcpuEvent};

use self::{happening::Happening, report::Report};
use crate::{
    cli,
    output::Output,
    serve::{self, Handler, Roster},
    session::Session,
    symbols::Names,
};

/// Reports what a guest does.
pub fn run(arguments: &cli::Trace, output: &mut Output) -> Result<()> {
    let symbols = Names::load(&arguments.symbols)?;
    let needs_symbols = |rip: &crate::area::Area| rip.needs_symbols();
    if symbols.is_none() && arguments.rip.as_ref().is_some_and(needs_symbols) {
        return Err(crate::address::no_symbols("a symbol is given"));
    }
    let mut session = Session::open(&arguments.vm)?;
    for vcpu in &arguments.vcpus {
        session.check_vcpu(*vcpu)?;
    }
    // From here on an interrupt ends the trace rather than the process.
    let waiter = session.watch()?;
    let report = Report::new(session.subject(), arguments.summary, output);
    let mut trace = Trace::start(arguments, symbols, &mut session, report)?;

    let (until, begun) = (arguments.until, trace.begun);
    let outcome = serve::serve(&mut trace, &mut session.vm, &waiter, until, begun);
    let stop = serve::judge(outcome, &waiter)?;
    serve::close(session, stop)?;
    trace.report.end(begun.elapsed(), stop)
}

/// What a guest is asked about, and what it has told.
struct Trace<'a> {
    kinds: &'a cli::Kinds,
    wanted: Wanted,
    names: late::Names,
    roster: Roster,
    begun: Instant,
    report: Report<'a>,
}

/// Which of the events are wanted.
struct Wanted {
    /// The value that is written.
    value: Option<u64>,
    /// Where the instruction is.
    rip: Option<Range<u64>>,
}

impl Wanted {
    fn matches(&self, happening: &Happening, event: &VcpuEvent) -> bool {
        let rip = event.arch.regs.rip;
        self.rip.as_ref().is_none_or(|range| range.contains(&rip))
            && self
                .value
                .is_none_or(|value| happening.value() == Some(value))
    }
}

impl<'a> Trace<'a> {
    /// Switches the events on while the VM stands still, all of them at the same moment for the
    /// guest.
    fn start(
        arguments: &'a cli::Trace,
        symbols: Option<Symbols>,
        session: &mut Session,
        report: Report<'a>,
    ) -> Result<Self> {
        let mut paused = session.pause()?;
        let rip = arguments.rip.as_ref();
        let names = late::Names::locate(symbols, &mut paused, rip.is_some())?;
        let wanted = Wanted {
            value: arguments.value,
            rip: rip
                .map(|area| area.range(area.is_number().then_some(1), names.known()))
                .transpose()?,
        };
        let some = Some(&arguments.vcpus).filter(|vcpus| !vcpus.is_empty());
        let mut roster = Roster::of(some.cloned());
        let kinds = &arguments.kinds;
        roster.prepare(&mut paused, |vm, vcpu| switch_on(kinds, vm, vcpu))?;
        let begun = Instant::now();
        paused.resume()?;
        let mut trace = Self {
            kinds,
            wanted,
            names,
            roster,
            begun,
            report,
        };
        trace.report.begin(trace.roster.dormant())?;
        Ok(trace)
    }
}

/// Switches events on on a vCPU.
fn switch_on(kinds: &cli::Kinds, vm: &mut Connection<OwnedFd>, vcpu: u16) -> Result<(), Error> {
    for (event, wanted) in [
        (EventId::Cr, !kinds.crs.is_empty()),
        (EventId::Msr, !kinds.msrs.is_empty()),
        (EventId::Xsetbv, kinds.xsetbv),
        (EventId::Descriptor, kinds.descriptors),
        (EventId::Hypercall, kinds.hypercalls),
        (EventId::Breakpoint, kinds.breakpoints),
    ] {
        if wanted {
            vm.vcpu_control_events(vcpu, event, true)?;
        }
    }
    for cr in &kinds.crs {
        vm.control_cr(vcpu, *cr, true)?;
    }
    for msr in &kinds.msrs {
        vm.control_msr(vcpu, msr.0, true)?;
    }
    Ok(())
}

impl Handler for Trace<'_> {
    fn look_for_vcpus(&mut self, vm: &mut Connection<OwnedFd>) -> Result<(), Error> {
        let kinds = self.kinds;
        let prepare = |vm: &mut Connection<OwnedFd>, vcpu| switch_on(kinds, vm, vcpu);
        self.roster.prepare(vm, prepare)
    }

    fn handle(&mut self, vm: &mut Connection<OwnedFd>, event: &VcpuEvent) -> Result<()> {
        self.names.look_again(vm, event);
        // Before all else: the guest waits for it. A register gets what the guest writes.
        vm.reply_event(event, Action::Continue)?;
        let after = self.begun.elapsed();
        let happening = Happening::of(event);
        match happening.filter(|happening| self.wanted.matches(happening, event)) {
            Some(happening) => {
                let names = self.names.known();
                self.report.happened(after, event, &happening, names)
            }
            None => {
                self.report.skip();
                Ok(())
            }
        }
    }

    fn count(&self) -> u64 {
        self.report.count()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::{memory::tests::with_script, msr::Msr};
    use kvmi_client::{
        abi::{
            arch::VcpuEventArch,
            guest_event::Cr,
            wire::{Header, ReplyHead},
        },
        Command, VcpuEventKind,
    };

    /// An event of vCPU 1.
    pub fn event(kind: VcpuEventKind) -> VcpuEvent {
        let mut arch = VcpuEventArch {
            mode: 8,
            ..Default::default()
        };
        arch.regs.rip = 0xffff_ffff_8120_0104;
        arch.regs.rdx = 0x1_0000_0002;
        VcpuEvent {
            seq: 1,
            vcpu: 1,
            arch,
            kind,
        }
    }

    #[test]
    fn only_what_is_asked_for_is_switched_on() {
        let kinds = cli::Kinds {
            crs: vec![Cr::Cr3, Cr::Cr4],
            msrs: vec![Msr(0xc000_0082)],
            hypercalls: true,
            ..Default::default()
        };
        let mut seen = Vec::new();
        let host = |header: &Header, payload: &[u8]| {
            assert_eq!(payload[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
            seen.push((Command::from_id(header.id).unwrap(), payload[8..].to_vec()));
            ReplyHead::success(header, 0).unwrap().as_bytes().to_vec()
        };
        with_script(host, |vm| switch_on(&kinds, vm, 1)).unwrap();
        let event = |event| (Command::VcpuControlEvents, vec![event, 0, 1, 0, 0, 0, 0, 0]);
        let expected = [
            event(7),
            event(15),
            event(3),
            (Command::VcpuControlCr, vec![3, 1, 0, 0, 0, 0, 0, 0]),
            (Command::VcpuControlCr, vec![4, 1, 0, 0, 0, 0, 0, 0]),
            (Command::VcpuControlMsr, vec![1, 0, 0, 0, 0x82, 0, 0, 0xc0]),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn events_can_be_chosen_by_value_and_place() {
        let rip = 0xffff_ffff_8120_0104;
        let (cr, old, new) = (Cr::Cr3, 1, 2);
        let write = event(VcpuEventKind::Cr { cr, old, new });
        let call = event(VcpuEventKind::Hypercall);
        for (value, range, of_write, of_call) in [
            (None, None, true, true),
            (Some(2), None, true, false),
            (Some(1), None, false, false),
            (None, Some(rip..rip + 1), true, true),
            (None, Some(rip + 1..rip + 2), false, false),
            (Some(2), Some(rip - 1..rip), false, false),
        ] {
            let wanted = Wanted { value, rip: range };
            let matches = |event| wanted.matches(&Happening::of(event).unwrap(), event);
            assert_eq!((matches(&write), matches(&call)), (of_write, of_call));
        }
    }
}
