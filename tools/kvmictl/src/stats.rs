// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl stats`

use std::time::Duration;

use anyhow::Result;
use kvmi_client::{
    abi::dev::{VmStatus, STATUS_DISCONNECTED, STATUS_HOOKED},
    device::Device,
};
use serde::Serialize;

use crate::{cli, list, output::Output, select};

/// What is printed as JSON.
#[derive(Serialize)]
struct Stats {
    pid: i32,
    vcpus: u32,
    /// All since the VM was hooked, if it is.
    session: Option<Session>,
}

/// What a session has done so far.
#[derive(Serialize)]
struct Session {
    hooked_by: i32,
    connected: bool,
    commands: u64,
    events: u64,
    vcpus_served: u32,
    memslot_changes: u64,
    /// Seconds that vCPUs have waited for replies to events.
    held_seconds: f64,
}

/// Prints what has been done in the session of whoever has a VM hooked.
pub fn run(arguments: &cli::Stats, output: &mut Output) -> Result<()> {
    let (vmm, target) = select::target(&arguments.vm)?;
    let status = target.status(&Device::open()?)?;
    let stats = Stats::new(vmm.pid, &status);
    if output.is_json() {
        return Ok(output.json(&stats)?);
    }
    for (label, value) in stats.lines() {
        output.line(format_args!("{label:<24}{value}"))?;
    }
    Ok(())
}

impl Stats {
    fn new(pid: i32, status: &VmStatus) -> Self {
        let hooked = status.flags & STATUS_HOOKED != 0;
        Self {
            pid,
            vcpus: status.vcpu_count,
            session: hooked.then_some(Session {
                hooked_by: status.hooked_by,
                connected: status.flags & STATUS_DISCONNECTED == 0,
                commands: status.commands,
                events: status.events,
                vcpus_served: status.vcpus_served,
                memslot_changes: status.memslot_changes,
                held_seconds: Duration::from_nanos(status.held_ns).as_secs_f64(),
            }),
        }
    }

    /// For people: labels and values.
    fn lines(&self) -> Vec<(&'static str, String)> {
        let Some(session) = &self.session else {
            return vec![("Hooked by", "nobody".to_owned())];
        };
        let link = if session.connected {
            ""
        } else {
            ", disconnected"
        };
        let by = list::process(session.hooked_by);
        let served = format!("{} of {}", session.vcpus_served, self.vcpus);
        vec![
            ("Hooked by", format!("{by}{link}")),
            ("Commands received", session.commands.to_string()),
            ("Events sent", session.events.to_string()),
            ("vCPUs that served", served),
            ("Memory slot changes", session.memslot_changes.to_string()),
            ("vCPUs held for", format!("{:.3} s", session.held_seconds)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_those_of_a_session() {
        let mut status = VmStatus {
            vcpu_count: 4,
            vcpus_served: 3,
            commands: 7,
            held_ns: 1_500_000_000,
            hooked_by: i32::MAX,
            ..Default::default()
        };
        assert!(Stats::new(1, &status).session.is_none());
        assert_eq!(Stats::new(1, &status).lines().len(), 1);
        status.flags = STATUS_HOOKED | STATUS_DISCONNECTED;
        let lines = Stats::new(1, &status).lines();
        assert!(lines[0].1.ends_with(", disconnected"), "{lines:?}");
        assert_eq!(lines[1], ("Commands received", "7".to_owned()));
        assert_eq!(lines[3].1, "3 of 4");
        assert_eq!(lines[5].1, "1.500 s");
    }
}
