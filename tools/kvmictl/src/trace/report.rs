// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What is printed of a trace.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use kvmi_client::VcpuEvent;
use serde_json::json;

use super::happening::Happening;
use crate::{
    output::{hex, Output},
    serve::Stop,
    session::Subject,
    symbols::Names,
    table::Table,
};

/// Prints what happens, and counts it.
pub struct Report<'a> {
    subject: Subject,
    output: &'a mut Output,
    /// Nothing is printed but the counters.
    summary_only: bool,
    counters: BTreeMap<String, u64>,
    count: u64,
    /// Events that were not wanted.
    others: u64,
}

impl<'a> Report<'a> {
    /// Prints what happens to a VM, or only counts it.
    pub fn new(subject: Subject, summary_only: bool, output: &'a mut Output) -> Self {
        Self {
            subject,
            output,
            summary_only,
            counters: BTreeMap::new(),
            count: 0,
            others: 0,
        }
    }

    /// How many events were wanted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The guest is traced from now on.
    pub fn begin(&mut self, dormant: &[u16]) -> Result<()> {
        if self.output.is_json() {
            self.output.json(&json!({
                "state": "tracing",
                "pid": self.subject.pid,
                "dormant": dormant,
            }))?;
        } else {
            let mut line = format!("tracing {}", self.subject);
            if !dormant.is_empty() {
                line += &format!("; {} vCPUs not started yet", dormant.len());
            }
            self.output.line(line + "; interrupt to stop")?;
        }
        Ok(self.output.flush()?)
    }

    /// An event that is not wanted.
    pub fn skip(&mut self) {
        self.others += 1;
    }

    /// Something has happened so long after the beginning.
    pub fn happened(
        &mut self,
        after: Duration,
        event: &VcpuEvent,
        happening: &Happening,
        names: &Names,
    ) -> Result<()> {
        self.count += 1;
        match self.counters.get_mut(&happening.what) {
            Some(count) => *count += 1,
            None => {
                self.counters.insert(happening.what.clone(), 1);
            }
        }
        if self.summary_only {
            return Ok(());
        }
        let rip = event.arch.regs.rip;
        if self.output.is_json() {
            let mut line = happening.json();
            line["seconds"] = after.as_secs_f64().into();
            line["vcpu"] = event.vcpu.into();
            line["rip"] = hex(rip).into();
            line["symbol"] = json!(names.json(rip));
            self.output.json(&line)?;
        } else {
            self.output.line(line(after, event, happening, names))?;
        }
        Ok(self.output.flush()?)
    }

    /// The guest is not traced any more.
    pub fn end(&mut self, after: Duration, stop: Stop) -> Result<()> {
        let seconds = after.as_secs_f64();
        if self.output.is_json() {
            return Ok(self.output.json(&json!({
                "state": "ended",
                "pid": self.subject.pid,
                "reason": stop.reason(),
                "counters": self.counters,
                "events": self.count,
                "others": self.others,
                "seconds": seconds,
            }))?);
        }
        if !self.counters.is_empty() {
            self.output.line(counters(&self.counters, seconds))?;
        }
        let mut line = format!("{} events in {seconds:.1} s", self.count);
        if self.others > 0 {
            line += &format!("; {} others", self.others);
        }
        if stop == Stop::VmEnded {
            line += "; the VM has ended";
        }
        Ok(self.output.line(line)?)
    }
}

fn line(after: Duration, event: &VcpuEvent, happening: &Happening, names: &Names) -> String {
    let rip = event.arch.regs.rip;
    let place = names.text(rip).map(|place| format!(" {place}"));
    format!(
        "{:>12.6} vCPU {} {rip:#x}{} {}",
        after.as_secs_f64(),
        event.vcpu,
        place.unwrap_or_default(),
        happening.text(),
    )
}

/// The counters, the largest first.
fn counters(counters: &BTreeMap<String, u64>, seconds: f64) -> Table {
    let mut rows: Vec<_> = counters.iter().collect();
    rows.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let mut table = Table::new(&["WHAT", "COUNT", "PER SECOND"]);
    for (what, count) in rows {
        // Good to 53 bits.
        let rate = *count as f64 / seconds.max(1e-6);
        table.add([what.clone(), count.to_string(), format!("{rate:.1}")]);
    }
    table.align_right(&[1, 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{symbols::tests::with_names, trace::tests::event};
    use kvmi_client::VcpuEventKind;

    #[test]
    fn line_tells_when_where_and_what() {
        let event = event(VcpuEventKind::Msr {
            msr: 0xc000_0082,
            old: 0,
            new: 0x1000,
        });
        let happening = Happening::of(&event).unwrap();
        let after = Duration::from_micros(1_234_567);
        with_names(|names| {
            let expected = "    1.234567 vCPU 1 0xffffffff81200104 schedule+0x4/0x100 \
                            LSTAR 0x0 -> 0x1000";
            assert_eq!(line(after, &event, &happening, names), expected);
        });
        let expected = "    1.234567 vCPU 1 0xffffffff81200104 LSTAR 0x0 -> 0x1000";
        assert_eq!(line(after, &event, &happening, &Names::none()), expected);
    }

    #[test]
    fn counters_are_in_order_of_their_size() {
        let counted = [("CR3", 300), ("EFER", 1), ("LSTAR", 20)];
        let counted = counted.map(|(what, count)| (what.to_owned(), count)).into();
        let text = counters(&counted, 2.0).to_string();
        let words: Vec<Vec<_>> = text
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(words[1], ["CR3", "300", "150.0"]);
        assert_eq!(words[2], ["LSTAR", "20", "10.0"]);
        assert_eq!(words[3], ["EFER", "1", "0.5"]);
    }
}
