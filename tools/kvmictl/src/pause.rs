// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl pause`

use std::time::Instant;

use anyhow::Result;
use kvmi_client::VcpuEvent;
use serde_json::json;

use crate::{
    cli::Pause,
    output::{hex, Output},
    session::{Session, Subject},
    symbols::Names,
    wait::End,
};

/// Pauses a VM for a while.
pub fn run(arguments: &Pause, output: &mut Output) -> Result<()> {
    let symbols = Names::load(&arguments.symbols)?;
    let mut session = Session::open(&arguments.vm)?;
    let subject = session.subject();
    // From here on an interrupt ends the pause rather than the process.
    let waiter = session.watch()?;
    // In a pause of its own, lest it makes the other one longer than asked for.
    let names = match symbols {
        Some(symbols) => Names::locate_paused(Some(symbols), &mut session.pause()?)?,
        None => Names::none(),
    };
    session.allow_pause(arguments.duration)?;
    let paused = session.pause()?;
    let begun = Instant::now();
    announce(&subject, paused.vcpus(), paused.dormant(), &names, output)?;

    let end = waiter.wait_as_tool(arguments.duration)?;
    let seconds = begun.elapsed().as_secs_f64();
    if end == End::VmEnded {
        // There is nothing left to resume or to unhook.
        drop(paused);
        drop(session);
    } else {
        paused.resume()?;
        session.close()?;
    }
    report(&subject, end, seconds, output)
}

fn announce(
    subject: &Subject,
    vcpus: &[VcpuEvent],
    dormant: &[u16],
    names: &Names,
    output: &mut Output,
) -> Result<()> {
    if output.is_json() {
        let mut state = json!({
            "state": "paused",
            "pid": subject.pid,
            "vcpus": vcpus.len(),
            "dormant": dormant,
        });
        if names.are_known() {
            let places = vcpus.iter().map(|vcpu| {
                let rip = vcpu.arch.regs.rip;
                json!({ "vcpu": vcpu.vcpu, "rip": hex(rip), "symbol": names.json(rip) })
            });
            state["places"] = places.collect();
        }
        output.json(&state)?;
    } else {
        let count = match vcpus.len() {
            1 => "1 vCPU".to_owned(),
            vcpus => format!("{vcpus} vCPUs"),
        };
        let mut line = format!("paused {count} of {subject}");
        if !dormant.is_empty() {
            line += &format!("; {} not started yet", dormant.len());
        }
        output.line(line + "; interrupt to resume")?;
        for vcpu in vcpus.iter().filter(|_| names.are_known()) {
            let rip = vcpu.arch.regs.rip;
            let place = names.text(rip).unwrap_or_else(|| "-".to_owned());
            output.line(format_args!("vCPU {}: {rip:#x} {place}", vcpu.vcpu))?;
        }
    }
    Ok(output.flush()?)
}

fn report(subject: &Subject, end: End, seconds: f64, output: &mut Output) -> Result<()> {
    let (state, reason) = outcome(end);
    if output.is_json() {
        return Ok(output.json(&json!({
            "state": state,
            "pid": subject.pid,
            "reason": reason,
            "seconds": seconds,
        }))?);
    }
    Ok(output.line(match end {
        End::VmEnded => format!("the VM has ended after {seconds:.1} s"),
        _ => format!("resumed after {seconds:.1} s"),
    })?)
}

/// What the VM does after the pause, and why.
fn outcome(end: End) -> (&'static str, &'static str) {
    match end {
        End::VmEnded | End::ToolHungUp => ("ended", "vm"),
        End::Signal => ("resumed", "signal"),
        End::Timeout => ("resumed", "timeout"),
    }
}
