// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What is printed of breakpoints.

use std::time::Duration;

use anyhow::Result;
use kvmi_client::VcpuEvent;
use serde_json::{json, Map, Value};

use super::patch::Patch;
use crate::{
    output::{gpa, hex, Output},
    regs::sets::general,
    serve::Stop,
    session::Subject,
    state,
    symbols::Names,
};

/// The registers that a line has room for: those of arguments, of results, and the stack.
const SHOWN: [&str; 8] = ["rdi", "rsi", "rdx", "rcx", "r8", "r9", "rax", "rsp"];

/// Prints what happens.
pub struct Report<'a> {
    subject: Subject,
    output: &'a mut Output,
}

impl<'a> Report<'a> {
    /// Prints what happens to a VM.
    pub fn new(subject: Subject, output: &'a mut Output) -> Self {
        Self { subject, output }
    }

    /// The breakpoints are there.
    pub fn begin(&mut self, patches: &[Patch], names: &Names, dormant: &[u16]) -> Result<()> {
        if self.output.is_json() {
            let place = |patch: &Patch| {
                json!({
                    "gva": hex(patch.gva),
                    "gpa": gpa(patch.gpa),
                    "symbol": names.json(patch.gva),
                })
            };
            self.output.json(&json!({
                "state": "waiting",
                "pid": self.subject.pid,
                "breakpoints": patches.iter().map(place).collect::<Vec<_>>(),
                "dormant": dormant,
            }))?;
        } else {
            let mut line = format!("{} breakpoints in {}", patches.len(), self.subject);
            if !dormant.is_empty() {
                line += &format!("; {} vCPUs not started yet", dormant.len());
            }
            self.output.line(line + "; interrupt to stop")?;
        }
        Ok(self.output.flush()?)
    }

    /// A vCPU has got to a breakpoint, so long after the beginning.
    pub fn hit(&mut self, after: Duration, event: &VcpuEvent, names: &Names) -> Result<()> {
        let rip = event.arch.regs.rip;
        if self.output.is_json() {
            let registers: Map<String, Value> = general(&event.arch.regs)
                .iter()
                .map(|(name, value)| ((*name).to_owned(), hex(*value).into()))
                .collect();
            self.output.json(&json!({
                "seconds": after.as_secs_f64(),
                "vcpu": event.vcpu,
                "rip": hex(rip),
                "symbol": names.json(rip),
                "mode": state::mode(event.arch.mode.into()),
                "cpl": state::cpl(&event.arch.regs, &event.arch.sregs),
                "cr3": hex(event.arch.sregs.cr3),
                "registers": registers,
            }))?;
        } else {
            self.output.line(lines(after, event, names))?;
        }
        Ok(self.output.flush()?)
    }

    /// The breakpoints are gone.
    pub fn end(&mut self, after: Duration, hits: u64, others: u64, stop: Stop) -> Result<()> {
        let seconds = after.as_secs_f64();
        if self.output.is_json() {
            return Ok(self.output.json(&json!({
                "state": "ended",
                "pid": self.subject.pid,
                "reason": stop.reason(),
                "hits": hits,
                "others": others,
                "seconds": seconds,
            }))?);
        }
        let mut line = format!("{hits} hits in {seconds:.1} s");
        if others > 0 {
            line += &format!("; {others} breakpoints of the guest's own");
        }
        line += match stop {
            Stop::VmEnded => "; the VM has ended",
            _ => "; no breakpoint is left",
        };
        Ok(self.output.line(line)?)
    }
}

fn lines(after: Duration, event: &VcpuEvent, names: &Names) -> String {
    let arch = &event.arch;
    let rip = arch.regs.rip;
    let place = names.text(rip).map(|place| format!(" {place}"));
    let registers: String = SHOWN
        .iter()
        .filter_map(|shown| {
            general(&arch.regs)
                .into_iter()
                .find(|(name, _)| name == shown)
        })
        .map(|(name, value)| format!(" {name}={value:#x}"))
        .collect();
    format!(
        "{:>12.6} vCPU {} {rip:#x}{} {} CPL {} cr3={:#x}\n{:12}{registers}",
        after.as_secs_f64(),
        event.vcpu,
        place.unwrap_or_default(),
        state::mode(arch.mode.into()),
        state::cpl(&arch.regs, &arch.sregs),
        arch.sregs.cr3,
        "",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{symbols::tests::with_names, trace::tests::event};
    use kvmi_client::VcpuEventKind;

    #[test]
    fn hit_is_told_with_registers() {
        let mut event = event(VcpuEventKind::Pause);
        event.arch.regs.rdi = 0x77;
        event.arch.sregs.cr3 = 0x1000;
        with_names(|names| {
            let text = lines(Duration::from_millis(2500), &event, names);
            let expected =
                "    2.500000 vCPU 1 0xffffffff81200104 schedule+0x4/0x100 64-bit CPL 0 \
                            cr3=0x1000\n             rdi=0x77 rsi=0x0 rdx=0x100000002 rcx=0x0 \
                            r8=0x0 r9=0x0 rax=0x0 rsp=0x0";
            assert_eq!(text, expected);
        });
    }
}
