// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Exits of a guest.

use anyhow::{bail, Result};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Bench, Row};
use crate::{
    figure::{Setting, Spread},
    program::Program,
    scene::Hook,
};

pub const CPUID: &str = "exit to KVM (CPUID)";
pub const PIO: &str = "exit to user space and back (OUT)";

/// The rows of this file.
pub const ROWS: &[Row] = &[Row::everywhere(CPUID, cpuid), Row::everywhere(PIO, pio)];

/// CPUIDs per return to user space.
const CPUIDS: u32 = 100;

fn cpuid(bench: &Bench<'_>) -> Result<Spread> {
    let (some, none) = (runs(bench, CPUIDS)?, runs(bench, 0)?);
    Ok(some.share(none, CPUIDS))
}

fn pio(bench: &Bench<'_>) -> Result<Spread> {
    runs(bench, 0)
}

/// One `KVM_RUN` in which the guest executes so many CPUIDs and an OUT.
fn runs(bench: &Bench<'_>, cpuids: u32) -> Result<Spread> {
    let (vm, mut vcpu) = Program::CpuidOut(cpuids).load()?;
    let _hook = match bench.setting {
        Setting::Hooked => Some(Hook::new(&vm)?),
        _ => None,
    };
    bench.measure(|| run(&mut vcpu))
}

/// Runs a guest until it writes to a port.
pub fn run(vcpu: &mut VcpuFd) -> Result<()> {
    match vcpu.run()? {
        VcpuExit::IoOut(..) => Ok(()),
        exit => bail!("unexpected exit of the guest: {exit:?}"),
    }
}
