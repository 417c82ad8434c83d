// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A VM, hooked for the time of one command.

use std::{
    io, ops,
    os::{fd::AsFd as _, unix::net::UnixStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use kvmi_client::{
    abi::dev::VmStatus,
    attach::{Attachment, Target},
    device::Device,
    Connection, Paused,
};

use crate::{
    cli::{Range, Selector},
    output::gpa,
    problem::Problem,
    select,
    wait::Waiter,
};

/// How long the vCPUs may take to pause.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Guest physical addresses of a memory slot.
type Slot = ops::Range<u64>;

/// A hooked VM.
#[derive(Debug)]
pub struct Session {
    /// The connection to it. (Before the attachment: fields are dropped in order.)
    pub vm: Connection<UnixStream>,
    /// What it was just before it was hooked.
    pub status: VmStatus,
    /// Where it had memory then.
    memory: Vec<Slot>,
    attachment: Attachment,
    target: Target,
}

impl Session {
    /// Hooks the VM that a selector means.
    pub fn open(selector: &Selector) -> Result<Self> {
        let (_, target) = select::target(selector)?;
        let device = Device::open()?;
        let status = target.status(&device)?;
        let memory = target.memory(&device)?;
        let (attachment, vm) = Attachment::connect_to(&target, device)?;
        Ok(Self {
            vm,
            status,
            memory,
            attachment,
            target,
        })
    }

    /// The process that the VM belongs to.
    pub fn pid(&self) -> i32 {
        self.target.pid()
    }

    /// Watches for the end of the VM and for signals, which from now on do not end this process.
    pub fn watch(&self) -> io::Result<Waiter> {
        Waiter::new(&self.target, self.vm.stream().as_fd())
    }

    /// Sets for how long the VM may be paused, or wait for a reply otherwise, before the host breaks
    /// the connection; `None` is for ever.
    pub fn allow_pause(&self, time: Option<Duration>) -> Result<()> {
        let time = time.map(|time| time.saturating_add(PAUSE_TIMEOUT));
        Ok(self.attachment.device().set_event_timeout(time)?)
    }

    /// Sets whether accesses of the CPU to the guest's page tables make events.
    pub fn report_page_walks(&self, report: bool) -> Result<()> {
        Ok(self.attachment.device().report_page_walks(report)?)
    }

    /// Pauses the VM until what this returns is dropped.
    pub fn pause(&mut self) -> Result<Paused<'_, UnixStream>> {
        let paused = self.vm.pause_all(PAUSE_TIMEOUT);
        paused.context("cannot pause the VM")
    }

    /// Checks that the VM has a vCPU.
    pub fn check_vcpu(&self, vcpu: u16) -> Result<()> {
        check_vcpu(vcpu, self.status.vcpu_count)
    }

    /// All vCPUs that the VM had when it was hooked.
    pub fn vcpus(&self) -> Vec<u16> {
        // Indices have 16 bits.
        (0..u16::try_from(self.status.vcpu_count).unwrap_or(u16::MAX)).collect()
    }

    /// Unhooks the VM.
    pub fn close(self) -> Result<()> {
        drop(self.vm);
        Ok(self.attachment.unhook()?)
    }

    /// The addresses that a range means: the first one, and how many.
    pub fn resolve(&self, range: &Range) -> Result<(u64, u64)> {
        resolve(range, self.status.max_gpa)
    }

    /// The parts of `len` bytes at `start` where the VM has memory: first address and length.
    pub fn memory(&self, start: u64, len: u64) -> Vec<(u64, u64)> {
        clip(&self.memory, start, len)
    }
}

fn check_vcpu(vcpu: u16, count: u32) -> Result<()> {
    if u32::from(vcpu) < count {
        return Ok(());
    }
    let what = format!("there is no vCPU {vcpu}: the VM has {count}");
    Err(Problem::new(what, "vCPUs are numbered from 0 on").into())
}

fn clip(slots: &[Slot], start: u64, len: u64) -> Vec<(u64, u64)> {
    let end = start.saturating_add(len);
    slots
        .iter()
        .map(|slot| (slot.start.max(start), slot.end.min(end)))
        .filter(|(from, to)| from < to)
        .map(|(from, to)| (from, to - from))
        .collect()
}

fn resolve(range: &Range, end: u64) -> Result<(u64, u64)> {
    let to = range.to.unwrap_or(end);
    match to.checked_sub(range.from) {
        Some(len) if len > 0 => Ok((range.from, len)),
        _ => {
            let what = format!("there is nothing from {} to {}", gpa(range.from), gpa(to));
            Err(Problem::new(what, "--to must be above --from").into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_without_memory_are_left_out() {
        let slots = [0..10, 20..30, 30..40];
        assert_eq!(clip(&slots, 0, 100), [(0, 10), (20, 10), (30, 10)]);
        assert_eq!(clip(&slots, 5, 20), [(5, 5), (20, 5)]);
        assert_eq!(clip(&slots, 10, 10), []);
        assert_eq!(clip(&slots, 39, u64::MAX), [(39, 1)]);
    }

    #[test]
    fn vcpus_are_numbered_from_zero() {
        assert!(check_vcpu(1, 2).is_ok());
        let error = check_vcpu(2, 2).unwrap_err();
        assert!(error.to_string().contains("no vCPU 2"), "{error}");
    }

    #[test]
    fn ranges_end_where_the_memory_does_unless_told_otherwise() {
        let range = |from, to| Range { from, to };
        assert_eq!(resolve(&range(0, None), 100).unwrap(), (0, 100));
        assert_eq!(resolve(&range(10, Some(30)), 100).unwrap(), (10, 20));
        assert_eq!(resolve(&range(10, Some(300)), 100).unwrap(), (10, 290));
        for empty in [range(100, None), range(10, Some(10)), range(10, Some(9))] {
            assert!(resolve(&empty, 100).is_err());
        }
    }
}
