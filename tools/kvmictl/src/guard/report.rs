// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What is printed of a guard.

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use super::{
    attempt::{Attempt, Verdict},
    Guard,
};
use crate::{
    output::{gpa, hex, size, Output},
    serve::Stop,
    session::Subject,
    symbols::{Names, Printed},
};

/// Prints what happens.
pub struct Report<'a> {
    subject: Subject,
    output: &'a mut Output,
}

/// An access, as it is printed as JSON.
#[derive(Serialize)]
struct Record {
    vcpu: u16,
    access: String,
    gpa: String,
    gva: Option<String>,
    /// What is there.
    target: Option<Printed>,
    rip: String,
    /// What is at rip.
    symbol: Option<Printed>,
    verdict: Verdict,
}

impl<'a> Report<'a> {
    /// Prints what happens to a VM.
    pub fn new(subject: Subject, output: &'a mut Output) -> Self {
        Self { subject, output }
    }

    /// The guest is guarded from now on.
    pub fn begin(&mut self, guard: &Guard, pages: usize) -> Result<()> {
        let (subject, bytes) = (&self.subject, guard.spans.size());
        if self.output.is_json() {
            self.output.json(&json!({
                "state": "guarding",
                "pid": subject.pid,
                "bytes": bytes,
                "pages": pages,
                "denied": guard.deny.to_string(),
                "block": guard.block,
                "dormant": guard.roster.dormant(),
            }))?;
        } else {
            let what = if guard.block { "blocking" } else { "watching" };
            let mut line = format!(
                "{what} {} accesses to {} in {pages} pages of {subject}",
                guard.deny,
                size(bytes),
            );
            if !guard.roster.dormant().is_empty() {
                line += &format!("; {} vCPUs not started yet", guard.roster.dormant().len());
            }
            self.output.line(line + "; interrupt to stop")?;
        }
        Ok(self.output.flush()?)
    }

    /// An access, and what has become of it. `target` is the address by which the symbols know what
    /// is accessed.
    pub fn access(
        &mut self,
        names: &Names,
        attempt: &Attempt<'_>,
        target: Option<u64>,
        verdict: Verdict,
    ) -> Result<()> {
        let rip = attempt.event.arch.regs.rip;
        let target = target.or(attempt.gva);
        if self.output.is_json() {
            self.output.json(&Record {
                vcpu: attempt.event.vcpu,
                access: attempt.access.to_string(),
                gpa: gpa(attempt.gpa),
                gva: attempt.gva.map(hex),
                target: target.and_then(|target| names.json(target)),
                rip: hex(rip),
                symbol: names.json(rip),
                verdict,
            })?;
        } else {
            let named = |address, known: bool| match names.text(address).filter(|_| known) {
                Some(place) => format!(" {place}"),
                None => String::new(),
            };
            let gva = attempt.gva.map(|gva| format!(" gva {gva:#x}"));
            let target = named(target.unwrap_or_default(), target.is_some());
            self.output.line(format_args!(
                "vCPU {} {} gpa {}{}{target} by {}{}: {}",
                attempt.event.vcpu,
                attempt.access,
                gpa(attempt.gpa),
                gva.unwrap_or_default(),
                hex(rip),
                named(rip, true),
                verdict.text(),
            ))?;
        }
        Ok(self.output.flush()?)
    }

    /// The guest does as it likes again.
    pub fn end(&mut self, guard: &Guard, stop: Stop) -> Result<()> {
        let (accesses, seconds) = (guard.reported, guard.begun.elapsed().as_secs_f64());
        if self.output.is_json() {
            return Ok(self.output.json(&json!({
                "state": "ended",
                "pid": self.subject.pid,
                "reason": stop.reason(),
                "accesses": accesses,
                "others": guard.unreported,
                "seconds": seconds,
            }))?);
        }
        let mut line = format!("{accesses} accesses in {seconds:.1} s");
        if guard.unreported > 0 {
            line += &format!("; {} beside them in the same pages", guard.unreported);
        }
        line += match stop {
            Stop::VmEnded => "; the VM has ended",
            _ => "; no page is restricted any more",
        };
        Ok(self.output.line(line)?)
    }
}

impl Verdict {
    fn text(self) -> &'static str {
        match self {
            Self::Permitted => "permitted",
            Self::Skipped => "blocked, skipped",
            Self::Faulted => "blocked, #GP",
            Self::Unstoppable => "permitted, cannot be blocked here",
        }
    }
}
