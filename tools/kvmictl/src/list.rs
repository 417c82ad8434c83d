// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl list`

use std::fs;

use anyhow::Result;
use kvmi_client::{
    abi::dev::{VmStatus, STATUS_HOOKED, STATUS_INTROSPECTOR},
    attach::Target,
    device::Device,
    discover::{self, Vmm},
    AttachError,
};
use serde::Serialize;

use crate::{
    output::{plain, size, Output},
    table::Table,
};

/// A VM, as it is printed.
#[derive(Serialize)]
struct Row {
    pid: i32,
    vm_fd: i32,
    vmm: String,
    name: Option<String>,
    uuid: Option<String>,
    vcpus: u64,
    memory_bytes: Option<u64>,
    /// Unknown without the module.
    hooked: Option<bool>,
    hooked_by: Option<i32>,
    introspector: Option<bool>,
}

/// What is printed as JSON.
#[derive(Serialize)]
struct List<'a> {
    vms: &'a [Row],
    notes: &'a [String],
}

/// Prints the VMs of this host.
pub fn run(output: &mut Output) -> Result<()> {
    let scan = discover::scan()?;
    let mut notes = Vec::new();
    let device = match Device::open() {
        Ok(device) => Some(device),
        Err(error) => {
            notes.push(unknown(&error));
            None
        }
    };
    if scan.hidden > 0 {
        notes.push(format!(
            "{} processes of other users could not be looked into; run this as root to see all",
            scan.hidden
        ));
    }
    let mut rows = Vec::new();
    for vmm in &scan.vmms {
        for fd in &vmm.vm_fds {
            let status = match status(vmm, *fd, device.as_ref()) {
                Ok(status) => status,
                // It ended while we looked.
                Err(AttachError::Gone) => continue,
                Err(error) => {
                    notes.push(format!("process {}: {error}", vmm.pid));
                    None
                }
            };
            rows.push(Row::new(vmm, *fd, status));
        }
    }
    print(&rows, &notes, output)
}

/// Says what is missing because of an error.
fn unknown(error: &AttachError) -> String {
    let remedy = match error {
        AttachError::NoModule => " (is the module kvmi_host loaded?)",
        AttachError::NotPermitted(_) => " (run this as root)",
        _ => "",
    };
    format!(
        "{error}{remedy}: who has which VM hooked is unknown, the rest is from the command lines"
    )
}

fn status(vmm: &Vmm, fd: i32, device: Option<&Device>) -> Result<Option<VmStatus>, AttachError> {
    let Some(device) = device else {
        return Ok(None);
    };
    Target::new(vmm, Some(fd))?.status(device).map(Some)
}

impl Row {
    fn new(vmm: &Vmm, vm_fd: i32, status: Option<VmStatus>) -> Self {
        let known = &vmm.command_line;
        let hooked = status.map(|s| s.flags & STATUS_HOOKED != 0);
        Self {
            pid: vmm.pid,
            vm_fd,
            vmm: vmm.name.clone(),
            name: known.guest_name.clone(),
            uuid: known.uuid.map(|uuid| uuid.to_string()),
            vcpus: status.map_or(vmm.vcpus as u64, |s| s.vcpu_count.into()),
            memory_bytes: status.map(|s| s.memory_bytes).or(known.memory),
            hooked,
            hooked_by: status.filter(|_| hooked == Some(true)).map(|s| s.hooked_by),
            introspector: status.map(|s| s.flags & STATUS_INTROSPECTOR != 0),
        }
    }

    fn hook(&self) -> String {
        match (self.hooked, self.hooked_by) {
            (None, _) => "?".to_owned(),
            (Some(true), Some(pid)) => process(pid),
            (Some(true), None) => "yes".to_owned(),
            (Some(false), _) if self.introspector == Some(true) => "- (introspector)".to_owned(),
            (Some(false), _) => "-".to_owned(),
        }
    }
}

/// A process for people: its pid and its name.
pub fn process(pid: i32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("{pid} ({})", plain(name.trim_end())),
        Err(_) => pid.to_string(),
    }
}

fn print(rows: &[Row], notes: &[String], output: &mut Output) -> Result<()> {
    if output.is_json() {
        return Ok(output.json(&List { vms: rows, notes })?);
    }
    output.line(table(rows))?;
    output.flush()?;
    for note in notes {
        eprintln!("note: {note}");
    }
    Ok(())
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&[
        "PID",
        "FD",
        "VMM",
        "NAME",
        "UUID",
        "VCPUS",
        "MEMORY",
        "HOOKED BY",
    ]);
    for row in rows {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        table.add([
            row.pid.to_string(),
            row.vm_fd.to_string(),
            plain(&row.vmm),
            or_dash(row.name.as_deref().map(plain)),
            or_dash(row.uuid.clone()),
            row.vcpus.to_string(),
            or_dash(row.memory_bytes.map(size)),
            row.hook(),
        ]);
    }
    table.align_right(&[0, 1, 5, 6])
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmi_client::qemu::CommandLine;

    fn vmm() -> Vmm {
        Vmm {
            pid: 42,
            name: "qemu-system-x86".to_owned(),
            command_line: CommandLine {
                guest_name: Some("web\x1b".to_owned()),
                uuid: None,
                memory: Some(1 << 30),
            },
            start_time: 0,
            start_ticks: 0,
            vm_fds: vec![9],
            vcpus: 2,
        }
    }

    #[test]
    fn without_the_module_the_command_line_must_do() {
        let row = Row::new(&vmm(), 9, None);
        assert_eq!((row.vcpus, row.memory_bytes), (2, Some(1 << 30)));
        assert_eq!(row.hook(), "?");
        let table = table(&[row]).to_string();
        assert_eq!(table.lines().count(), 2);
        assert!(
            table.contains("web?") && table.contains("1.00 GiB"),
            "{table}"
        );
    }

    #[test]
    fn status_is_believed_first() {
        let mut status = VmStatus {
            vcpu_count: 3,
            memory_bytes: 1 << 20,
            hooked_by: 7,
            ..Default::default()
        };
        let row = Row::new(&vmm(), 9, Some(status));
        assert_eq!((row.vcpus, row.memory_bytes), (3, Some(1 << 20)));
        assert_eq!((row.hook().as_str(), row.hooked_by), ("-", None));
        status.flags = STATUS_INTROSPECTOR;
        let row = Row::new(&vmm(), 9, Some(status));
        assert_eq!(
            (row.hook().as_str(), row.hooked_by),
            ("- (introspector)", None)
        );
        status.flags = STATUS_HOOKED;
        assert_eq!(Row::new(&vmm(), 9, Some(status)).hooked_by, Some(7));
    }

    #[test]
    fn table_without_vms_has_a_header() {
        assert!(table(&[]).to_string().starts_with(" PID"));
    }
}
