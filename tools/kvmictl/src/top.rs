// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl top`

use std::time::Instant;

use anyhow::Result;
use kvmi_client::VcpuEvent;
use serde::Serialize;
use serde_json::json;

use crate::{
    cli::Top,
    output::{hex, Output},
    session::{Session, Subject},
    state,
    symbols::{Names, Printed},
    table::Table,
    wait::End,
};

/// Makes a terminal forget what it shows.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// What a vCPU is doing.
#[derive(Serialize)]
struct Row {
    vcpu: u16,
    mode: &'static str,
    cpl: u8,
    rip: String,
    rsp: String,
    cr3: String,
    /// What rip is, if the symbols of the kernel are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    symbol: Option<Option<Printed>>,
    /// The same for people.
    #[serde(skip)]
    place: Option<String>,
}

/// One look at the vCPUs.
#[derive(Serialize)]
struct Sample {
    #[serde(flatten)]
    subject: Subject,
    /// Number of the look, from 1 on.
    sample: u64,
    /// Seconds since the first one.
    seconds: f64,
    vcpus: Vec<Row>,
    /// vCPUs that the guest has not started.
    dormant: Vec<u16>,
}

/// Shows what the vCPUs are doing, again and again.
pub fn run(arguments: &Top, output: &mut Output) -> Result<()> {
    let mut symbols = Names::load(&arguments.symbols)?;
    let mut names = Names::none();
    let mut session = Session::open(&arguments.vm)?;
    let waiter = session.watch()?;
    let begun = Instant::now();
    let mut end = End::Timeout;
    let last = arguments.count.unwrap_or(u64::MAX);
    for number in 1..=last {
        if symbols.is_some() {
            // Paused, the guest cannot end or leave its kernel in the meantime.
            names = Names::locate_paused(symbols.take(), &mut session.pause()?)?;
        }
        match look(&mut session, number, begun, &names) {
            Ok(sample) => sample.print(output)?,
            Err(_) if waiter.vmm_has_ended()? => {
                end = End::VmEnded;
                break;
            }
            Err(error) => return Err(error),
        }
        if number == last {
            break;
        }
        end = waiter.wait_as_tool(Some(arguments.interval))?;
        if end != End::Timeout {
            break;
        }
    }
    if end != End::VmEnded {
        return session.close();
    }
    if output.is_json() {
        let pid = session.subject().pid;
        return Ok(output.json(&json!({ "state": "ended", "pid": pid, "reason": "vm" }))?);
    }
    Ok(output.line("the VM has ended")?)
}

/// Pauses the vCPUs for a moment.
fn look(session: &mut Session, number: u64, begun: Instant, names: &Names) -> Result<Sample> {
    let subject = session.subject();
    let paused = session.pause()?;
    let sample = Sample {
        subject,
        sample: number,
        seconds: begun.elapsed().as_secs_f64(),
        vcpus: paused
            .vcpus()
            .iter()
            .map(|event| Row::of(event, names))
            .collect(),
        dormant: paused.dormant().to_vec(),
    };
    paused.resume()?;
    Ok(sample)
}

impl Row {
    fn of(event: &VcpuEvent, names: &Names) -> Self {
        let arch = &event.arch;
        Self {
            vcpu: event.vcpu,
            mode: state::mode(arch.mode.into()),
            cpl: state::cpl(&arch.regs, &arch.sregs),
            rip: hex(arch.regs.rip),
            rsp: hex(arch.regs.rsp),
            cr3: hex(arch.sregs.cr3),
            symbol: names.are_known().then(|| names.json(arch.regs.rip)),
            place: names.text(arch.regs.rip),
        }
    }
}

impl Sample {
    fn print(&self, output: &mut Output) -> Result<()> {
        if output.is_json() {
            output.json(self)?;
        } else {
            let clear = if output.is_terminal() { CLEAR } else { "" };
            output.line(format_args!("{clear}{}", self.text()))?;
        }
        Ok(output.flush()?)
    }

    fn text(&self) -> String {
        // A place is there, or not, for all of them.
        let known = self.vcpus.iter().any(|row| row.symbol.is_some());
        let columns = ["VCPU", "MODE", "CPL", "RIP", "RSP", "CR3", "AT"];
        let columns = if known { &columns[..] } else { &columns[..6] };
        let mut table = Table::new(columns);
        for row in &self.vcpus {
            let (vcpu, cpl) = (row.vcpu.to_string(), row.cpl.to_string());
            let [rip, rsp, cr3] = [&row.rip, &row.rsp, &row.cr3].map(Clone::clone);
            let place = known.then(|| row.place.clone().unwrap_or_else(|| "-".to_owned()));
            let row = [vcpu, row.mode.to_owned(), cpl, rip, rsp, cr3];
            table.add(row.into_iter().chain(place));
        }
        for vcpu in &self.dormant {
            let rest = columns.iter().skip(2).map(|_| "-".to_owned());
            table.add([vcpu.to_string(), "off".to_owned()].into_iter().chain(rest));
        }
        let table = table.align_right(&[0, 2, 3, 4, 5]);
        format!("{}, {:.1} s\n{table}\n", self.subject, self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbols::tests::with_names;
    use kvmi_client::{abi::arch::VcpuEventArch, VcpuEventKind};

    fn sample(names: &Names) -> Sample {
        let mut arch = VcpuEventArch {
            mode: 8,
            ..Default::default()
        };
        arch.regs.rip = 0xffff_ffff_8100_0000;
        arch.sregs.cr3 = 0x1000;
        let event = VcpuEvent {
            seq: 1,
            vcpu: 0,
            arch,
            kind: VcpuEventKind::Pause,
        };
        Sample {
            subject: Subject {
                pid: Some(42),
                name: None,
            },
            sample: 1,
            seconds: 0.25,
            vcpus: vec![Row::of(&event, names)],
            dormant: vec![1],
        }
    }

    #[test]
    fn text_is_a_table() {
        let text = sample(&Names::none()).text();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0], "the VM of process 42, 0.2 s");
        for part in ["64-bit", "0xffffffff81000000", "0x1000"] {
            assert!(lines[2].contains(part), "{text}");
        }
        assert!(lines[3].contains("off"), "{text}");
        assert!(!lines[1].contains("AT"), "{text}");
    }

    #[test]
    fn places_have_a_column_if_symbols_are_known() {
        with_names(|names| {
            let sample = sample(names);
            let text = sample.text();
            let lines: Vec<_> = text.lines().collect();
            assert!(lines[1].ends_with("  AT"), "{text}");
            assert!(lines[2].ends_with("  -"), "{text}");
            let json = serde_json::to_value(sample).unwrap();
            assert!(json["vcpus"][0]["symbol"].is_null());
        });
    }

    #[test]
    fn json_is_one_object() {
        let json = serde_json::to_value(sample(&Names::none())).unwrap();
        assert_eq!(json["vcpus"][0]["rip"], "0xffffffff81000000");
        assert_eq!(json["vcpus"][0]["cpl"], 0);
        assert_eq!(json["dormant"][0], 1);
        assert!(json["vcpus"][0].get("symbol").is_none());
    }
}
