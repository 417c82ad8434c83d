// SPDX-License-Identifier: GPL-2.0 OR MIT

//! An access that the guest is denied.

use std::os::fd::AsFd;

use kvmi_client::{Access, Connection, Error, Result, VcpuEvent, PAGE_SIZE};
use serde::Serialize;

use super::spans::Spans;
use crate::{area::Span, instruction::Instruction};

/// Vector of the exception that tells the guest of an access that is not allowed.
///
/// Not #PF: an operating system that finds its page tables allow the access takes that for a stale
/// TLB entry, and tries again for ever.
const GENERAL_PROTECTION: u8 = 13;

/// What becomes of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is done.
    Permitted,
    /// Its instruction is left out.
    Skipped,
    /// Its instruction raises an exception.
    Faulted,
    /// It is done since another exception or interrupt is being delivered.
    Unstoppable,
}

/// An access that waits for its verdict.
pub struct Attempt<'a> {
    pub event: &'a VcpuEvent,
    pub gva: Option<u64>,
    pub gpa: u64,
    pub access: Access,
    /// What makes it, once that is read.
    instruction: Option<Option<Instruction<'a>>>,
}

impl<'a> Attempt<'a> {
    /// What an event says.
    pub fn new(event: &'a VcpuEvent, gva: Option<u64>, gpa: u64, access: Access) -> Self {
        Self {
            event,
            gva,
            gpa,
            access,
            instruction: None,
        }
    }

    fn instruction<S: AsFd>(&mut self, vm: &mut Connection<S>) -> Result<Option<&Instruction<'a>>> {
        let known = match self.instruction.take() {
            Some(known) => known,
            None => Instruction::of(vm, self.event)?,
        };
        Ok(self.instruction.insert(known).as_ref())
    }

    /// What is guarded of the bytes that are accessed. The event tells the first one only; the
    /// instruction tells how many there are. If it does not, it may be all up to the end of the page.
    pub fn hit<'s, S: AsFd>(
        &mut self,
        spans: &'s Spans,
        vm: &mut Connection<S>,
    ) -> Result<Option<&'s Span>> {
        let (gpa, access) = (self.gpa, self.access);
        let page_end = (gpa - gpa % PAGE_SIZE).saturating_add(PAGE_SIZE);
        let Some(span) = spans.overlapping(gpa..page_end) else {
            return Ok(None);
        };
        if span.gpa.start <= gpa {
            return Ok(Some(span));
        }
        let instruction = self.instruction(vm)?;
        let reach = instruction.and_then(|instruction| instruction.reach(gpa, access));
        let end = reach.map_or(page_end, |bytes| gpa.saturating_add(bytes).min(page_end));
        Ok(spans.overlapping(gpa..end))
    }

    /// Sees to it that the access is not done when the vCPU is told to retry. An instruction that
    /// does nothing but to store is left out; any other one raises an exception.
    pub fn refuse<S: AsFd>(&mut self, vm: &mut Connection<S>) -> Result<Verdict> {
        let vcpu = self.event.vcpu;
        let stores = self.access == Access::W;
        let skipped = match self.instruction(vm)? {
            Some(instruction) if stores => instruction.skipped(),
            _ => None,
        };
        if let Some(regs) = skipped {
            vm.set_registers(vcpu, &regs)?;
            return Ok(Verdict::Skipped);
        }
        match vm.inject_exception(vcpu, GENERAL_PROTECTION, 0, 0) {
            Ok(()) => Ok(Verdict::Faulted),
            Err(Error::Kvmi(..)) => Ok(Verdict::Unstoppable),
            Err(error) => Err(error),
        }
    }
}
