// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl break`
//!
//! A breakpoint is an INT3 in the guest's memory, which all of its vCPUs share. Whoever hits one has to
//! execute what belongs there: it is put there, the vCPU is single-stepped, and the INT3 comes back.
//! Meanwhile the other vCPUs are out of the guest, each because of a pause that it is asked for before,
//! so that none of them gets past.
//!
//! A vCPU that waits at a breakpoint which is taken out for good has to try again: if it went on as
//! usual it would tell the guest of a breakpoint that the guest knows nothing of.

mod patch;
mod report;

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use kvmi_client::{
    symbols::Symbols, Action, Connection, Error, Event, EventId, KvmiError, Paused, VcpuEvent,
    VcpuEventKind,
};

use self::{
    patch::{Patch, Patches},
    report::Report,
};
use crate::{
    address::{self, Address},
    area::translate,
    cli,
    output::{hex, Output},
    problem::Problem,
    serve::{self, Handler, Roster, Stop},
    session::Session,
    stepper,
    symbols::Names,
    wait::Waiter,
};

/// How long an instruction may take, or a vCPU to pause.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often in a row an instruction may be put off before the vCPU is let go.
const MOST_FAILURES: u32 = 16;

/// How many executions that were interrupted are remembered; some never come back.
const MOST_INTERRUPTED: usize = 1024;

/// Reports when the guest gets to some instructions.
pub fn run(arguments: &cli::Break, output: &mut Output) -> Result<()> {
    let symbols = Names::load(&arguments.symbols)?;
    if symbols.is_none() && arguments.addresses.iter().any(Address::is_symbol) {
        return Err(address::no_symbols("a symbol is given"));
    }
    let mut session = Session::open(&arguments.vm)?;
    stepper::check(&mut session.vm)?;
    // From here on an interrupt ends the breakpoints rather than the process.
    let waiter = session.watch()?;
    // A guest whose tool was thrown out because of a delay would crash at the next breakpoint.
    session.allow_pause(None)?;
    let report = Report::new(session.subject(), output);
    let (mut breaks, started) = Breaks::start(arguments, symbols, &mut session, report)?;

    // From here on nothing returns before the breakpoints are out.
    let begun = breaks.begun;
    let outcome = started.and_then(|()| breaks.begin()).and_then(|()| {
        serve::serve(
            &mut breaks,
            &mut session.vm,
            &waiter,
            arguments.until,
            begun,
        )
    });
    let outcome = serve::judge(outcome, &waiter);
    let stop = breaks.finish(session, &waiter, outcome, &arguments.vm)?;
    let (hits, others) = (breaks.hits, breaks.others);
    breaks.report.end(begun.elapsed(), hits, others, stop)
}

/// Breakpoints in a guest, and what has happened to them.
struct Breaks<'a> {
    patches: Patches,
    names: Names,
    roster: Roster,
    begun: Instant,
    report: Report<'a>,
    hits: u64,
    /// Breakpoints of the guest's own.
    others: u64,
    /// Where instructions were interrupted before they were executed: rip and rsp.
    interrupted: VecDeque<(u64, u64)>,
    /// An event that was received, and has no reply so far.
    pending: Option<VcpuEvent>,
    /// The vCPU that is being single-stepped.
    stepping: Option<u16>,
}

impl<'a> Breaks<'a> {
    /// Puts the breakpoints in while the VM stands still. Some may be there even if not all could be
    /// put in, or if the VM could not be resumed.
    fn start(
        arguments: &cli::Break,
        symbols: Option<Symbols>,
        session: &mut Session,
        report: Report<'a>,
    ) -> Result<(Self, Result<()>)> {
        let mut paused = session.pause()?;
        let names = Names::locate_paused(symbols, &mut paused)?;
        let places = places(&arguments.addresses, &names, &mut paused)?;
        let mut roster = Roster::default();
        // First: nobody else knows what to do about a breakpoint.
        roster.prepare(&mut paused, switch_on)?;
        let (patches, inserted) = Patches::insert(&mut paused, &places);
        let breaks = Self {
            patches,
            names,
            roster,
            begun: Instant::now(),
            report,
            hits: 0,
            others: 0,
            interrupted: VecDeque::new(),
            pending: None,
            stepping: None,
        };
        Ok((breaks, inserted.and_then(|()| Ok(paused.resume()?))))
    }

    fn begin(&mut self) -> Result<()> {
        let dormant = self.roster.dormant();
        self.report.begin(self.patches.all(), &self.names, dormant)
    }

    /// The vCPUs that may be in the guest.
    fn started(&self) -> Vec<u16> {
        let dormant = self.roster.dormant();
        let vcpus = self.roster.all();
        vcpus.filter(|vcpu| !dormant.contains(vcpu)).collect()
    }

    /// The breakpoint that an event is about.
    fn patch(&self, event: &VcpuEvent) -> Option<Patch> {
        match event.kind {
            VcpuEventKind::Breakpoint { gpa, .. } => self.patches.at(gpa?).copied(),
            _ => None,
        }
    }

    /// Replies to the event that is pending.
    fn reply(&mut self, vm: &mut Connection<OwnedFd>, action: Action) -> Result<(), Error> {
        match self.pending.take() {
            Some(event) => vm.reply_event(&event, action),
            None => Ok(()),
        }
    }

    /// Decides about an event, which is the pending one. There may be another one of the same vCPU
    /// afterwards.
    fn decide(&mut self, vm: &mut Connection<OwnedFd>, event: &VcpuEvent) -> Result<()> {
        let Some(patch) = self.patch(event) else {
            // The end of a pause, or a matter of the guest's.
            let own = matches!(event.kind, VcpuEventKind::Breakpoint { .. });
            self.others += u64::from(own);
            return Ok(self.reply(vm, Action::Continue)?);
        };
        let after = self.begun.elapsed();
        for vcpu in self.started() {
            if vcpu != event.vcpu {
                hold(vm, vcpu)?;
            }
        }
        let executed = self.step_over(vm, event, patch)?;
        if self.is_new(event, executed) {
            self.hits += 1;
            self.report.hit(after, event, &self.names)?;
        }
        Ok(())
    }

    /// Has a vCPU execute what belongs to where a breakpoint is, while the others are out of the
    /// guest. Gives whether it was executed, rather than interrupted.
    fn step_over(
        &mut self,
        vm: &mut Connection<OwnedFd>,
        event: &VcpuEvent,
        patch: Patch,
    ) -> Result<bool> {
        let vcpu = event.vcpu;
        patch.take_out(vm)?;
        vm.control_singlestep(vcpu, true)?;
        self.stepping = Some(vcpu);
        self.reply(vm, Action::Retry)?;
        let mut failures = 0;
        let last = loop {
            let Some(step) = stepper::next_event(vm, vcpu, PATIENCE)? else {
                let what = format!("vCPU {vcpu} does not get past {}", hex(patch.gva));
                return Err(Problem::new(what, "the VMM may have stopped the VM").into());
            };
            let kind = self.pending.insert(step.clone()).kind.clone();
            let stays = step.arch.regs.rip == event.arch.regs.rip;
            let put_off = kind == VcpuEventKind::Singlestep { failed: true };
            if !put_off || !stays || failures == MOST_FAILURES {
                break kind;
            }
            failures += 1;
            self.reply(vm, Action::Continue)?;
        };
        patch.put_in(vm)?;
        vm.control_singlestep(vcpu, false)?;
        self.stepping = None;
        match last {
            VcpuEventKind::Singlestep { failed } => {
                self.reply(vm, Action::Continue)?;
                Ok(!failed)
            }
            // It is still pending.
            _ => Ok(false),
        }
    }

    /// Whether a hit is not one that was interrupted, and told, before: then the same task comes back
    /// to the same place, maybe on another vCPU.
    fn is_new(&mut self, hit: &VcpuEvent, executed: bool) -> bool {
        let place = (hit.arch.regs.rip, hit.arch.regs.rsp);
        let known = self.interrupted.iter().position(|known| *known == place);
        match known {
            Some(at) if executed => {
                self.interrupted.remove(at);
            }
            None if !executed => {
                self.interrupted.truncate(MOST_INTERRUPTED - 1);
                self.interrupted.push_front(place);
            }
            _ => {}
        }
        known.is_none()
    }

    /// Lets a vCPU go on once the breakpoints are out.
    fn let_go(&mut self, vm: &mut Connection<OwnedFd>) -> Result<(), Error> {
        let at_breakpoint = self.pending.as_ref().and_then(|event| self.patch(event));
        let action = match at_breakpoint {
            Some(_) => Action::Retry,
            None => Action::Continue,
        };
        self.reply(vm, action)
    }

    /// Takes the breakpoints out, and sees to it that nobody waits at one.
    fn remove(&mut self, vm: &mut Connection<OwnedFd>) -> Result<()> {
        let mut left = Vec::new();
        for vcpu in self.started() {
            if hold(vm, vcpu)? {
                left.push(vcpu);
            }
        }
        self.patches.remove(vm)?;
        if let Some(vcpu) = self.stepping.take() {
            vm.control_singlestep(vcpu, false)?;
        }
        self.let_go(vm)?;
        // What a vCPU has to tell comes before its pause.
        let deadline = Instant::now() + PATIENCE;
        while !left.is_empty() {
            let time = deadline.saturating_duration_since(Instant::now());
            match vm.next_event(Some(time)) {
                Ok(Event::Vcpu(event)) => {
                    if event.kind == VcpuEventKind::Pause {
                        left.retain(|vcpu| *vcpu != event.vcpu);
                    }
                    self.pending = Some(*event);
                    self.let_go(vm)?;
                }
                Ok(_) => {}
                // The VMM has stopped the vCPU, which is at no breakpoint then.
                Err(Error::Timeout) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Takes the breakpoints out, whatever has happened before, and unhooks the VM.
    fn finish(
        &mut self,
        mut session: Session,
        waiter: &Waiter,
        outcome: Result<Stop>,
        vm: &cli::Reach,
    ) -> Result<Stop> {
        if let Ok(Stop::VmEnded) = outcome {
            return outcome;
        }
        let removed = self.remove(&mut session.vm);
        if removed.is_ok() {
            let stop = outcome?;
            serve::close(session, stop)?;
            return Ok(stop);
        }
        drop(session);
        if waiter.vmm_has_ended()? {
            return Ok(Stop::VmEnded);
        }
        // The connection is broken, but the VM is there. Another one may do.
        let removed = match vm.listen {
            None => self.remove_anew(vm),
            Some(_) => removed,
        };
        let places: Vec<_> = self.patches.all().iter().map(|p| hex(p.gva)).collect();
        removed.with_context(|| {
            format!("breakpoints are left in the guest at {}", places.join(", "))
        })?;
        outcome
    }

    /// Hooks the VM once more to take the breakpoints out.
    fn remove_anew(&self, vm: &cli::Reach) -> Result<()> {
        let mut session = Session::open(vm)?;
        self.patches.remove(&mut session.vm)?;
        session.close()
    }
}

impl Handler for Breaks<'_> {
    fn look_for_vcpus(&mut self, vm: &mut Connection<OwnedFd>) -> Result<(), Error> {
        self.roster.prepare(vm, switch_on)
    }

    fn handle(&mut self, vm: &mut Connection<OwnedFd>, event: &VcpuEvent) -> Result<()> {
        self.pending = Some(event.clone());
        while let Some(event) = self.pending.clone() {
            self.decide(vm, &event)?;
        }
        Ok(())
    }

    fn count(&self) -> u64 {
        self.hits
    }
}

fn switch_on(vm: &mut Connection<OwnedFd>, vcpu: u16) -> Result<(), Error> {
    vm.vcpu_control_events(vcpu, EventId::Breakpoint, true)
}

/// Where some addresses are: virtual and physical ones.
fn places(
    addresses: &[Address],
    names: &Names,
    paused: &mut Paused<'_, OwnedFd>,
) -> Result<Vec<(u64, u64)>> {
    let mut places = Vec::new();
    for address in addresses {
        let gva = address.of(names)?;
        places.push((gva, translate(paused, gva)?));
    }
    Ok(places)
}

/// Gets a vCPU out of the guest until the reply to its pause; gives whether it has been started.
fn hold(vm: &mut Connection<OwnedFd>, vcpu: u16) -> Result<bool, Error> {
    match vm.pause_vcpu(vcpu, true) {
        Ok(()) => Ok(true),
        Err(Error::Kvmi(KvmiError::Again, _)) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
