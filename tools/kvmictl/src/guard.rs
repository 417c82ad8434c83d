// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl guard` and `kvmictl watch`

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::Result;
use kvmi_client::{
    Access, Action, Connection, Error, Event, EventId, KvmiError, VcpuEvent, VcpuEventKind,
};

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
    session::Session,
    symbols::Names,
    wait::{End, Waiter},
};

mod attempt;
mod report;
mod spans;

/// How often to look for vCPUs that the guest has started meanwhile, or has got.
const LOOK: Duration = Duration::from_secs(1);

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

        let outcome = guard.serve(&mut session.vm, &waiter, &mut report);
        let end = match outcome {
            Err(error) if is_closed(&error) && waiter.vmm_has_ended()? => End::VmEnded,
            outcome => outcome?,
        };
        if end == End::VmEnded {
            // There is nothing left to unhook.
            drop(session);
        } else {
            // This lifts the restrictions, and whoever waits for a reply goes on.
            session.close()?;
        }
        report.end(&guard, end)
    }

    /// Restricts the pages while the VM stands still, all of them at the same moment for the guest.
    fn start(
        &self,
        symbols: Option<kvmi_client::symbols::Symbols>,
        session: &mut Session,
    ) -> Result<(Guard, usize)> {
        session.report_page_walks(self.page_walks)?;
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
            until: self.until,
            begun: Instant::now(),
            known: 0,
            unseen: Vec::new(),
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

/// Pages of a guest that are restricted, and what has happened to them.
struct Guard {
    spans: Spans,
    names: Names,
    deny: Access,
    block: bool,
    until: cli::Until,
    begun: Instant,
    /// How many vCPUs there are, as far as is known.
    known: u16,
    /// Those of them that the guest has not started.
    unseen: Vec<u16>,
    reported: u64,
    /// Accesses to the same pages that are nobody's business.
    unreported: u64,
}

impl Guard {
    /// Switches the event on on vCPUs where it is not yet: what they are denied would be permitted
    /// silently.
    fn look_for_vcpus(&mut self, vm: &mut Connection<OwnedFd>) -> Result<(), Error> {
        // Indices have 16 bits.
        let count = u16::try_from(vm.get_info()?.vcpu_count).unwrap_or(u16::MAX);
        let new = self.known..count;
        self.known = count;
        let mut unseen = Vec::new();
        for vcpu in std::mem::take(&mut self.unseen).into_iter().chain(new) {
            match vm.vcpu_control_events(vcpu, EventId::Pf, true) {
                Ok(()) => {}
                Err(Error::Kvmi(KvmiError::Again, _)) => unseen.push(vcpu),
                Err(error) => return Err(error),
            }
        }
        self.unseen = unseen;
        Ok(())
    }

    /// Replies to events until it is time to stop.
    fn serve(
        &mut self,
        vm: &mut Connection<OwnedFd>,
        waiter: &Waiter,
        report: &mut Report<'_>,
    ) -> Result<End> {
        let mut looked = Instant::now();
        loop {
            let event = vm.try_event()?;
            let idle = event.is_none();
            if let Some(Event::Vcpu(event)) = event {
                self.handle(vm, &event, report)?;
            }
            let left = self.time_left();
            if left == Some(Duration::ZERO) || self.until.count == Some(self.reported) {
                return Ok(End::Timeout);
            }
            if looked.elapsed() >= LOOK {
                self.look_for_vcpus(vm)?;
                looked = Instant::now();
            }
            let pause = if idle {
                left.map_or(LOOK, |left| left.min(LOOK))
            } else {
                Duration::ZERO
            };
            match waiter.wait_for_message(Some(pause))? {
                // There are more events, or it is time to look.
                None | Some(End::Timeout) => {}
                Some(end) => return Ok(end),
            }
        }
    }

    fn time_left(&self) -> Option<Duration> {
        let duration = self.until.duration?;
        Some(duration.saturating_sub(self.begun.elapsed()))
    }

    fn handle(
        &mut self,
        vm: &mut Connection<OwnedFd>,
        event: &VcpuEvent,
        report: &mut Report<'_>,
    ) -> Result<()> {
        let VcpuEventKind::Pf { gva, gpa, access } = event.kind else {
            // A TRAP event: an exception that was injected is on its way.
            return Ok(vm.reply_event(event, Action::Continue)?);
        };
        let mut attempt = Attempt::new(event, gva, gpa, access);
        let Some(span) = attempt.hit(&self.spans, vm)? else {
            self.unreported += 1;
            return Ok(vm.reply_event(event, Action::Continue)?);
        };
        let target = span.virtual_address(gpa);
        let verdict = if self.block {
            attempt.refuse(vm)?
        } else {
            Verdict::Permitted
        };
        let action = match verdict {
            Verdict::Permitted | Verdict::Unstoppable => Action::Continue,
            Verdict::Skipped | Verdict::Faulted => Action::Retry,
        };
        vm.reply_event(event, action)?;
        self.reported += 1;
        report.access(&self.names, &attempt, target, verdict)
    }
}

fn is_closed(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<Error>(),
        Some(Error::Closed | Error::Unusable)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::with_script;
    use kvmi_client::{
        abi::wire::{Header, ReplyHead},
        Command,
    };

    #[test]
    fn vcpus_get_their_events_when_they_are_started_or_added() {
        let mut guard = Guard {
            spans: Spans::new(Vec::new()),
            names: Names::none(),
            deny: Access::W,
            block: false,
            until: cli::Until::default(),
            begun: Instant::now(),
            known: 0,
            unseen: Vec::new(),
            reported: 0,
            unreported: 0,
        };
        for (vcpus, dormant, asked) in [
            (2, &[1][..], &[0, 1][..]),
            (2, &[1], &[1]),
            (4, &[3], &[1, 2, 3]),
            (4, &[], &[3]),
            (4, &[], &[]),
        ] {
            let mut seen = Vec::new();
            let host = |header: &Header, payload: &[u8]| {
                if header.id == Command::VmGetInfo.id() {
                    let head = ReplyHead::success(header, 16).unwrap();
                    let mut info = [0; 16];
                    info[0] = vcpus;
                    return [head.as_bytes(), &info].concat();
                }
                let vcpu = u16::from_ne_bytes([payload[0], payload[1]]);
                assert_eq!(header.id, Command::VcpuControlEvents.id());
                assert_eq!(payload[8..], [17, 0, 1, 0, 0, 0, 0, 0]);
                seen.push(vcpu);
                if dormant.contains(&vcpu) {
                    let head = ReplyHead::failure(header, KvmiError::Again);
                    return head.as_bytes().to_vec();
                }
                ReplyHead::success(header, 0).unwrap().as_bytes().to_vec()
            };
            with_script(host, |vm| guard.look_for_vcpus(vm)).unwrap();
            assert_eq!((&seen[..], &guard.unseen[..]), (asked, dormant));
        }
    }
}
