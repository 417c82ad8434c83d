// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl top`

use std::time::Instant;

use anyhow::Result;
use comfy_table::{presets::NOTHING, CellAlignment, Table};
use kvmi_client::VcpuEvent;
use serde::Serialize;

use crate::{
    cli::Top,
    output::{hex, Output},
    session::Session,
    state,
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
}

/// One look at the vCPUs.
#[derive(Serialize)]
struct Sample {
    pid: i32,
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
    let mut session = Session::open(&arguments.vm)?;
    let waiter = session.watch()?;
    let begun = Instant::now();
    let mut end = End::Timeout;
    let last = arguments.count.unwrap_or(u64::MAX);
    for number in 1..=last {
        match look(&mut session, number, begun) {
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
    if !output.is_json() {
        output.line("the VM has ended")?;
    }
    Ok(())
}

/// Pauses the vCPUs for a moment.
fn look(session: &mut Session, number: u64, begun: Instant) -> Result<Sample> {
    let pid = session.pid();
    let paused = session.pause()?;
    let sample = Sample {
        pid,
        sample: number,
        seconds: begun.elapsed().as_secs_f64(),
        vcpus: paused.vcpus().iter().map(Row::of).collect(),
        dormant: paused.dormant().to_vec(),
    };
    paused.resume()?;
    Ok(sample)
}

impl Row {
    fn of(event: &VcpuEvent) -> Self {
        let arch = &event.arch;
        Self {
            vcpu: event.vcpu,
            mode: state::mode(arch.mode.into()),
            cpl: state::cpl(&arch.regs, &arch.sregs),
            rip: hex(arch.regs.rip),
            rsp: hex(arch.regs.rsp),
            cr3: hex(arch.sregs.cr3),
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
        let mut table = Table::new();
        let header = ["VCPU", "MODE", "CPL", "RIP", "RSP", "CR3"];
        table.load_preset(NOTHING).set_header(header);
        for row in &self.vcpus {
            let Row { rip, rsp, cr3, .. } = row;
            table.add_row([
                &row.vcpu.to_string(),
                row.mode,
                &row.cpl.to_string(),
                rip,
                rsp,
                cr3,
            ]);
        }
        for vcpu in &self.dormant {
            table.add_row([&vcpu.to_string(), "off", "-", "-", "-", "-"]);
        }
        for numeric in [0, 2, 3, 4, 5] {
            if let Some(column) = table.column_mut(numeric) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let mut text = format!("process {}, {:.1} s\n", self.pid, self.seconds);
        for line in table.lines() {
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmi_client::{abi::arch::VcpuEventArch, VcpuEventKind};

    fn sample() -> Sample {
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
            pid: 42,
            sample: 1,
            seconds: 0.25,
            vcpus: vec![Row::of(&event)],
            dormant: vec![1],
        }
    }

    #[test]
    fn text_is_a_table() {
        let text = sample().text();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0], "process 42, 0.2 s");
        for part in ["64-bit", "0xffffffff81000000", "0x1000"] {
            assert!(lines[2].contains(part), "{text}");
        }
        assert!(lines[3].contains("off"), "{text}");
    }

    #[test]
    fn json_is_one_object() {
        let json = serde_json::to_value(sample()).unwrap();
        assert_eq!(json["vcpus"][0]["rip"], "0xffffffff81000000");
        assert_eq!(json["vcpus"][0]["cpl"], 0);
        assert_eq!(json["dormant"][0], 1);
    }
}
