// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl guard` and `kvmictl watch`

use std::{os::fd::OwnedFd, time::Instant};

use anyhow::{Context as _, Result};
use kvmi_client::{Access, Action, Command, Connection, Error, EventId, VcpuEvent, VcpuEventKind};

use crate::{
    address::no_symbols,
    area::{touched, Area},
    cli,
    guard::{
        attempt::{Attempt, Verdict},
        report::Report,
        spans::Spans,
    },
    output::Output,
    serve::{self, Handler, Roster},
    session::Session,
    symbols::Names,
};

mod attempt;
mod report;
mod spans;

/// What is guarded, and how.
struct Order<'a> {
    areas: &'a [Area],
    /// Size of what is at an address.
    size: Option<u64>,
    deny: Access,
    block: bool,
    page_walks: bool,
    until: cli::Until,
}

/// Denies the guest accesses to a part of its memory.
pub fn run(arguments: &cli::Guard, output: &mut Output) -> Result<()> {
    let order = Order {
        areas: &arguments.areas,
        size: None,
        deny: arguments.deny,
        block: arguments.block,
        page_walks: arguments.page_walks,
        until: arguments.until,
    };
    order.carry_out(&arguments.vm, &arguments.symbols, output)
}

/// Reports writes to a structure of the guest.
pub fn watch(arguments: &cli::Watch, output: &mut Output) -> Result<()> {
    let has_size = arguments.address.is_whole_symbol();
    let order = Order {
        areas: &[Area::At(arguments.address.clone())],
        size: arguments.size.or((!has_size).then_some(1)),
        deny: Access::W,
        block: false,
        page_walks: false,
        until: arguments.until,
    };
    order.carry_out(&arguments.vm, &arguments.symbols, output)
}

impl Order<'_> {
    /// Whether the guest may have memory wherever it is given by numbers: the host would say so in
    /// the end, too, when the guest has stood still for long.
    fn check_numbers(&self, session: &Session) -> Result<()> {
        for area in self.areas.iter().filter(|area| !area.needs_symbols()) {
            session.check_end(area.range(self.size, &Names::none())?.end)?;
        }
        Ok(())
    }

    fn carry_out(
        &self,
        vm: &cli::Reach,
        symbols: &cli::SymbolFile,
        output: &mut Output,
    ) -> Result<()> {
        let symbols = Names::load(symbols)?;
        if symbols.is_none() && self.areas.iter().any(Area::needs_symbols) {
            return Err(no_symbols("a symbol is given"));
        }
        let mut session = Session::open(vm)?;
        // From here on an interrupt ends the guard rather than the process.
        let waiter = session.watch()?;
        let subject = session.subject();
        let (mut guard, pages) = self.start(symbols, &mut session)?;
        let mut report = Report::new(subject, output);
        report.begin(&guard, pages)?;

        let (until, begun) = (self.until, guard.begun);
        let mut serving = Serving {
            guard: &mut guard,
            report: &mut report,
        };
        let outcome = serve::serve(&mut serving, &mut session.vm, &waiter, until, begun);
        let stop = serve::judge(outcome, &waiter)?;
        serve::close(session, stop)?;
        report.end(&guard, stop)
    }

    /// Restricts the pages while the VM stands still, all of them at the same moment for the guest.
    fn start(
        &self,
        symbols: Option<kvmi_client::symbols::Symbols>,
        session: &mut Session,
    ) -> Result<(Guard, usize)> {
        session.report_page_walks(self.page_walks)?;
        if self.block {
            check_blocking(&mut session.vm).context("accesses cannot be blocked")?;
        }
        self.check_numbers(session)?;
        let mut paused = session.pause()?;
        let names = Names::locate_paused(symbols, &mut paused)?;
        let mut spans = Vec::new();
        for area in self.areas {
            spans.extend(area.find(self.size, &names, &mut paused)?);
        }
        let pages = touched(&spans);
        let mut guard = Guard {
            spans: Spans::new(spans),
            names,
            deny: self.deny,
            block: self.block,
            begun: Instant::now(),
            roster: Roster::default(),
            reported: 0,
            unreported: 0,
        };
        guard.look_for_vcpus(&mut paused)?;
        let allowed = Access::all() - self.deny;
        paused.set_page_access(pages.iter().map(|gpa| (*gpa, allowed)))?;
        guard.begun = Instant::now();
        paused.resume()?;
        Ok((guard, pages.len()))
    }
}

/// Whether the tool may do what refuses an access.
fn check_blocking(vm: &mut Connection<OwnedFd>) -> Result<(), Error> {
    vm.check_command(Command::VcpuSetRegisters)?;
    vm.check_command(Command::VcpuInjectException)?;
    vm.check_event(EventId::Trap)
}

/// Pages of a guest that are restricted, and what has happened to them.
struct Guard {
    spans: Spans,
    names: Names,
    deny: Access,
    block: bool,
    begun: Instant,
    roster: Roster,
    reported: u64,
    /// Accesses to the same pages that are nobody's business.
    unreported: u64,
}

impl Guard {
    /// Switches the event on on vCPUs where it is not yet: what they are denied would be permitted
    /// silently.
    fn look_for_vcpus(&mut self, vm: &mut Connection<OwnedFd>) -> Result<(), Error> {
        let prepare =
            |vm: &mut Connection<OwnedFd>, vcpu| vm.vcpu_control_events(vcpu, EventId::Pf, true);
        self.roster.prepare(vm, prepare)
    }
}

/// A guard at work.
struct Serving<'g, 'o> {
    guard: &'g mut Guard,
    report: &'g mut Report<'o>,
}

impl Handler for Serving<'_, '_> {
    fn look_for_vcpus(&mut self, vm: &mut Connection<OwnedFd>) -> Result<(), Error> {
        self.guard.look_for_vcpus(vm)
    }

    fn count(&self) -> u64 {
        self.guard.reported
    }

    fn handle(&mut self, vm: &mut Connection<OwnedFd>, event: &VcpuEvent) -> Result<()> {
        let VcpuEventKind::Pf { gva, gpa, access } = event.kind else {
            // A TRAP event: an exception that was injected is on its way.
            return Ok(vm.reply_event(event, Action::Continue)?);
        };
        let guard = &mut *self.guard;
        let mut attempt = Attempt::new(event, gva, gpa, access);
        let Some(span) = attempt.hit(&guard.spans, vm)? else {
            guard.unreported += 1;
            return Ok(vm.reply_event(event, Action::Continue)?);
        };
        let target = span.virtual_address(gpa);
        let verdict = if guard.block {
            attempt.refuse(vm)?
        } else {
            Verdict::Permitted
        };
        let action = match verdict {
            Verdict::Permitted | Verdict::Unstoppable => Action::Continue,
            Verdict::Skipped | Verdict::Faulted => Action::Retry,
        };
        vm.reply_event(event, action)?;
        guard.reported += 1;
        self.report.access(&guard.names, &attempt, target, verdict)
    }
}
