// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A VM, hooked for the time of one command.

use std::{ops, os::unix::net::UnixStream};

use anyhow::Result;
use kvmi_client::{abi::dev::VmStatus, attach::Attachment, device::Device, Connection};

use crate::{
    cli::{Range, Selector},
    output::gpa,
    problem::Problem,
    select,
};

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
        })
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
