// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl attach`: the part of a VMM that knows introspection.

use std::os::{
    fd::{AsFd as _, OwnedFd},
    unix::net::UnixStream,
};

use anyhow::{Context as _, Result};
use kvmi_client::{
    abi::handshake::VmmHello, attach::Target, device::Device, discover::Vmm, vmm::handshake,
    AttachError,
};
use serde_json::json;
use vsock::VsockStream;

use crate::{
    allow::Allowed,
    cli::{Attach, Tool},
    listen::read_cookie,
    output::{plain, Output},
    problem::Problem,
    select,
    wait::{End, Waiter},
};

/// Hooks a VM to a tool and stays until one of them has enough.
pub fn run(arguments: &Attach, output: &mut Output) -> Result<()> {
    let cookie = read_cookie(arguments.cookie_file.as_deref())?;
    let (vmm, target) = select::target(&arguments.vm)?;
    let device = Device::open()?;
    let max_gpa = target.status(&device)?.max_gpa;

    // Nothing is read from this socket after the handshake: what comes is for the kernel.
    let socket = connect(&arguments.tool)?;
    let hello = hello(&vmm, max_gpa);
    handshake(
        &socket,
        &hello,
        cookie.as_ref(),
        arguments.handshake_timeout,
    )
    .context("the handshake with the tool failed")?;

    let waiter = Waiter::new(Some(&target), socket.as_fd())?;
    allow(&device, arguments)?;
    let attachment = target.attach(device, &socket)?;
    announce(&vmm, &target, arguments, output)?;

    let mut end = waiter.wait(None)?;
    if end == End::Signal && attachment.pre_unhook().unwrap_or(false) {
        // The tool may clean up first; if it takes too long, or at another signal, it is cut off.
        end = match waiter.wait(Some(arguments.unhook_timeout))? {
            End::Timeout => End::Timeout,
            _ => End::Signal,
        };
    }
    match attachment.unhook() {
        Ok(()) => {}
        // There is nothing left to unhook.
        Err(_) if waiter.vmm_has_ended()? => {}
        Err(error) => return Err(error.into()),
    }
    if end == End::ToolHungUp && waiter.vmm_has_ended()? {
        end = End::VmEnded;
    }
    report(end, &vmm, output)
}

/// Connects to a tool.
fn connect(tool: &Tool) -> Result<OwnedFd> {
    const HINT: &str = "start the tool first, so that it listens there";
    if let Some(path) = &tool.socket {
        let stream = UnixStream::connect(path).map_err(|error| {
            Problem::new(
                format!("cannot connect to {}: {error}", path.display()),
                HINT,
            )
        })?;
        return Ok(stream.into());
    }
    let (cid, port) = tool.vsock.unwrap_or_default();
    let stream = VsockStream::connect_with_cid_port(cid, port).map_err(|error| {
        Problem::new(
            format!("cannot connect to vsock {cid}:{port}: {error}"),
            HINT,
        )
    })?;
    Ok(stream.as_fd().try_clone_to_owned()?)
}

/// Describes a VM to a tool.
fn hello(vmm: &Vmm, max_gpa: u64) -> VmmHello {
    let known = &vmm.command_line;
    let name = known.guest_name.as_deref().unwrap_or(&vmm.name);
    let uuid = known.uuid.unwrap_or_default();
    VmmHello::new(uuid.into_bytes(), vmm.start_time, name.as_bytes(), max_gpa)
}

/// Sets what the tool may do from its first command on.
fn allow(device: &Device, arguments: &Attach) -> Result<(), AttachError> {
    match &arguments.allow_commands {
        Allowed::All => device.allow_all_commands()?,
        Allowed::These(commands) => commands
            .iter()
            .try_for_each(|command| device.allow_command(*command, true))?,
    }
    match &arguments.allow_events {
        Allowed::All => device.allow_all_events(),
        Allowed::These(events) => events
            .iter()
            .try_for_each(|event| device.allow_event(*event, true)),
    }
}

fn announce(vmm: &Vmm, target: &Target, arguments: &Attach, output: &mut Output) -> Result<()> {
    let known = &vmm.command_line;
    let uuid = known.uuid.map(|uuid| uuid.to_string());
    if output.is_json() {
        output.json(&json!({
            "state": "hooked",
            "pid": vmm.pid,
            "vm_fd": target.vm_fd(),
            "name": known.guest_name,
            "uuid": uuid,
        }))?;
    } else {
        let mut line = format!("hooked the VM of process {}", vmm.pid);
        for detail in [known.guest_name.as_deref().map(plain), uuid] {
            line += &detail
                .map(|detail| format!(", {detail}"))
                .unwrap_or_default();
        }
        line += &match (&arguments.tool.socket, arguments.tool.vsock) {
            (Some(path), _) => format!(" to the tool at {}", path.display()),
            (None, Some((cid, port))) => format!(" to the tool at vsock {cid}:{port}"),
            (None, None) => String::new(),
        };
        output.line(line + "; interrupt to unhook")?;
    }
    Ok(output.flush()?)
}

fn report(end: End, vmm: &Vmm, output: &mut Output) -> Result<()> {
    let (reason, text) = match end {
        End::ToolHungUp => ("tool", "the tool has hung up"),
        End::VmEnded => ("vm", "the VM has ended"),
        End::Signal => ("signal", "interrupted"),
        End::Timeout => ("timeout", "interrupted; the tool did not hang up in time"),
    };
    if output.is_json() {
        output.json(&json!({ "state": "unhooked", "pid": vmm.pid, "reason": reason }))?;
    } else {
        output.line(format_args!("unhooked: {text}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmi_client::{qemu::CommandLine, Uuid};

    #[test]
    fn handshake_describes_the_vm() {
        let mut vmm = Vmm {
            pid: 42,
            name: "crosvm".to_owned(),
            command_line: CommandLine::default(),
            start_time: 1_700_000_000,
            start_ticks: 0,
            vm_fds: vec![9],
            vcpus: 2,
        };
        let plain = hello(&vmm, 0x8000_0000);
        assert_eq!((plain.name(), plain.uuid), (&b"crosvm"[..], [0; 16]));
        assert_eq!((plain.struct_size, plain.max_gpa), (104, 0x8000_0000));
        assert_eq!(plain.start_time, 1_700_000_000);

        vmm.command_line.guest_name = Some("web".to_owned());
        vmm.command_line.uuid = Some(Uuid::from_bytes([7; 16]));
        let qemu = hello(&vmm, 0);
        assert_eq!((qemu.name(), qemu.uuid), (&b"web"[..], [7; 16]));
    }

    #[test]
    fn absent_tool_is_a_problem_with_a_hint() {
        let tool = Tool {
            socket: Some("/nonexistent/tool".into()),
            vsock: None,
        };
        let error = connect(&tool).unwrap_err();
        assert!(error.downcast_ref::<Problem>().is_some());
    }
}
