// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl info`

use std::os::unix::net::UnixStream;

use anyhow::Result;
use kvmi_client::{
    abi::dev::{VmStatus, STATUS_DISCONNECTED, STATUS_HOOKED, STATUS_INTROSPECTOR},
    attach::{Attachment, Target},
    device::Device,
    discover::Vmm,
    AttachError, Command, Connection, Error, EventId,
};
use serde::Serialize;

use crate::{
    cli, list,
    output::{gpa, plain, size, Output},
    select,
};

/// What is printed.
#[derive(Serialize)]
struct Info {
    pid: i32,
    vm_fd: i32,
    vmm: String,
    name: Option<String>,
    uuid: Option<String>,
    vcpus: u32,
    memory_bytes: u64,
    max_gpa: String,
    /// Who has the VM hooked, if anybody.
    hook: Option<Hook>,
    /// Whether its guest may map memory of VMs that are introspected.
    introspector: bool,
    /// What the host says on a connection; none can be made while somebody has the VM hooked, or it
    /// is an introspector.
    protocol: Option<Protocol>,
    /// Why the VM cannot be hooked.
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<String>,
}

/// Who has a VM hooked.
#[derive(Serialize)]
struct Hook {
    by: i32,
    connected: bool,
    commands: u64,
    events: u64,
}

/// What the host says on a connection.
#[derive(Serialize)]
struct Protocol {
    version: u32,
    max_msg_size: u32,
    features: Vec<&'static str>,
    commands: Vec<&'static str>,
    events: Vec<&'static str>,
}

/// Prints what a VM is.
pub fn run(arguments: &cli::Info, output: &mut Output) -> Result<()> {
    let (vmm, target) = select::target(&arguments.vm)?;
    let device = Device::open()?;
    let status = target.status(&device)?;
    let mut info = Info::new(&vmm, &target, &status);
    if info.hook.is_none() && !info.introspector {
        match ask(&target, device) {
            Ok(protocol) => info.protocol = Some(protocol),
            Err(error) => info.refusal = Some(refusal(error)?),
        }
    }
    if output.is_json() {
        return Ok(output.json(&info)?);
    }
    for (label, value) in info.lines() {
        output.line(format_args!("{label:<16}{value}"))?;
    }
    Ok(())
}

fn hook(status: &VmStatus) -> Option<Hook> {
    (status.flags & STATUS_HOOKED != 0).then_some(Hook {
        by: status.hooked_by,
        connected: status.flags & STATUS_DISCONNECTED == 0,
        commands: status.commands,
        events: status.events,
    })
}

/// Why a VM could not be hooked, where the rest can be told nevertheless.
fn refusal(error: anyhow::Error) -> Result<String> {
    match error.downcast_ref() {
        Some(AttachError::Unsupported | AttachError::AlreadyHooked { .. }) => Ok(error.to_string()),
        _ => Err(error),
    }
}

/// Hooks the VM and asks.
fn ask(target: &Target, device: Device) -> Result<Protocol> {
    let (attachment, mut vm) = Attachment::connect_to(target, device)?;
    let protocol = Protocol::of(&mut vm)?;
    drop(vm);
    attachment.unhook()?;
    Ok(protocol)
}

impl Protocol {
    fn of(vm: &mut Connection<UnixStream>) -> Result<Self, Error> {
        let version = vm.get_version()?;
        let mut commands = Vec::new();
        for command in Command::ALL {
            if is_allowed(vm.check_command(*command))? {
                commands.push(command.name());
            }
        }
        let mut events = Vec::new();
        for event in EventId::ALL {
            if is_allowed(vm.check_event(*event))? {
                events.push(event.name());
            }
        }
        let singlestep = version.features.singlestep != 0;
        Ok(Self {
            version: version.version,
            max_msg_size: version.max_msg_size,
            features: singlestep.then_some("singlestep").into_iter().collect(),
            commands,
            events,
        })
    }
}

/// The host's answer to whether it knows and allows something.
fn is_allowed(answer: Result<(), Error>) -> Result<bool, Error> {
    match answer {
        Ok(()) => Ok(true),
        Err(Error::Kvmi(..)) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Info {
    fn new(vmm: &Vmm, target: &Target, status: &VmStatus) -> Self {
        Self {
            pid: vmm.pid,
            vm_fd: target.vm_fd(),
            vmm: vmm.name.clone(),
            name: vmm.command_line.guest_name.clone(),
            uuid: vmm.command_line.uuid.map(|uuid| uuid.to_string()),
            vcpus: status.vcpu_count,
            memory_bytes: status.memory_bytes,
            max_gpa: gpa(status.max_gpa),
            hook: hook(status),
            introspector: status.flags & STATUS_INTROSPECTOR != 0,
            protocol: None,
            refusal: None,
        }
    }

    /// For people: labels and values.
    fn lines(&self) -> Vec<(&'static str, String)> {
        let process = format!("{} ({})", self.pid, plain(&self.vmm));
        let mut lines = vec![
            ("Process", process),
            ("VM descriptor", self.vm_fd.to_string()),
        ];
        lines.extend(self.name.as_deref().map(|name| ("Name", plain(name))));
        lines.extend(self.uuid.clone().map(|uuid| ("UUID", uuid)));
        lines.extend([
            ("vCPUs", self.vcpus.to_string()),
            ("Memory", size(self.memory_bytes)),
            ("Memory ends at", self.max_gpa.clone()),
        ]);
        if let Some(hook) = &self.hook {
            let link = if hook.connected { "" } else { ", disconnected" };
            let by = list::process(hook.by);
            let traffic = format!("{} commands, {} events", hook.commands, hook.events);
            lines.push(("Hooked by", format!("{by}: {traffic}{link}")));
        }
        if self.introspector {
            let may = "may map memory of VMs that are introspected";
            lines.push(("Introspector", may.to_owned()));
        }
        let refusal = self.refusal.as_deref();
        lines.extend(refusal.map(|refusal| ("Protocol", plain(refusal))));
        if let Some(protocol) = &self.protocol {
            let (version, max) = (protocol.version, protocol.max_msg_size);
            lines.extend([
                (
                    "Protocol",
                    format!("version {version}, messages up to {max} bytes"),
                ),
                ("Features", names(&protocol.features)),
                ("Commands", names(&protocol.commands)),
                ("Events", names(&protocol.events)),
            ]);
        }
        lines
    }
}

fn names(names: &[&str]) -> String {
    if names.is_empty() {
        return "none".to_owned();
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmi_client::KvmiError;

    #[test]
    fn hook_is_told_from_the_flags() {
        let mut status = VmStatus {
            hooked_by: 5,
            ..Default::default()
        };
        assert!(hook(&status).is_none());
        status.flags = STATUS_HOOKED | STATUS_DISCONNECTED;
        let told = hook(&status).unwrap();
        assert_eq!((told.by, told.connected), (5, false));
    }

    #[test]
    fn vm_that_cannot_be_hooked_is_described_nevertheless() {
        let reason = refusal(AttachError::AlreadyHooked { by: Some(99) }.into());
        assert!(reason.unwrap().contains("99"));
        assert!(refusal(AttachError::Unsupported.into()).is_ok());
        assert!(refusal(AttachError::Gone.into()).is_err());
        assert!(refusal(Error::Closed.into()).is_err());
    }

    #[test]
    fn refusal_is_an_answer_and_a_failure_is_not() {
        let refused = Error::Kvmi(KvmiError::Perm, Command::VmCheckCommand);
        assert!(!is_allowed(Err(refused)).unwrap());
        assert!(is_allowed(Ok(())).unwrap());
        assert!(is_allowed(Err(Error::Closed)).is_err());
    }
}
