// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl introspector`

use anyhow::Result;
use kvmi_client::{
    abi::dev::{STATUS_HOOKED, STATUS_INTROSPECTOR},
    device::Device,
};
use serde_json::json;

use crate::{cli, output::Output, problem::Problem, select};

/// Tells whether a VM is an introspector, makes it one, or ends that.
pub fn run(arguments: &cli::Introspector, output: &mut Output) -> Result<()> {
    let (vmm, target) = select::target(&arguments.vm)?;
    let device = Device::open()?;
    let flags = target.status(&device)?.flags;
    let mut is_one = flags & STATUS_INTROSPECTOR != 0;
    if let Some(wanted) = arguments.wanted() {
        if wanted && flags & STATUS_HOOKED != 0 {
            let what = "this VM is introspected, and cannot be an introspector";
            return Err(Problem::new(what, "end the tool that has it hooked first").into());
        }
        // Twice the same is no error for people.
        if wanted != is_one {
            target.set_introspector(&device, wanted)?;
            is_one = wanted;
        }
    }
    if output.is_json() {
        return Ok(output.json(&json!({ "pid": vmm.pid, "introspector": is_one }))?);
    }
    let what = if is_one { "may" } else { "may not" };
    let line = format!(
        "{}: its guest {what} map memory of VMs that are introspected",
        vmm.pid
    );
    Ok(output.line(line)?)
}
