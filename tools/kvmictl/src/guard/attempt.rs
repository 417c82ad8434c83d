// SPDX-License-Identifier: GPL-2.0 OR MIT

//! An access that the guest is denied.

use std::os::fd::AsFd;

use kvmi_client::{Access, Connection, Error, KvmiError, Result, VcpuEvent, PAGE_SIZE};
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
    /// does nothing but to store, and this, is left out; any other one raises an exception. It is not
    /// always the instruction that stores: there are interrupts and page tables, too.
    pub fn refuse<S: AsFd>(&mut self, vm: &mut Connection<S>) -> Result<Verdict> {
        let (vcpu, gpa) = (self.event.vcpu, self.gpa);
        let writes = self.access == Access::W;
        let instruction = self.instruction(vm)?.filter(|_| writes);
        let culprit = instruction.filter(|code| code.reach(gpa, Access::W).is_some());
        let skipped = culprit.and_then(Instruction::skipped);
        if let Some(regs) = skipped {
            vm.set_registers(vcpu, &regs)?;
            return Ok(Verdict::Skipped);
        }
        match vm.inject_exception(vcpu, GENERAL_PROTECTION, 0, 0) {
            Ok(()) => Ok(Verdict::Faulted),
            Err(Error::Kvmi(KvmiError::Busy | KvmiError::Inval, _)) => Ok(Verdict::Unstoppable),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::with_script;
    use kvmi_client::{
        abi::{
            arch::VcpuEventArch,
            wire::{Header, ReplyHead},
        },
        Command, VcpuEventKind,
    };

    /// An event of vCPU 3, where `rip` is, about a write to 0x5008.
    fn write(rip: u64, rdi: u64) -> VcpuEvent {
        let mut arch = VcpuEventArch {
            mode: 8,
            ..Default::default()
        };
        (arch.regs.rip, arch.regs.rdi) = (rip, rdi);
        VcpuEvent {
            seq: 1,
            vcpu: 3,
            arch,
            kind: VcpuEventKind::Pause,
        }
    }

    /// Looks into an attempt on a VM that has `code` at each address, and nothing mapped from 0x9000
    /// on; gives what came out, and the commands that it took, with the last one's payload.
    fn with_code<R>(
        code: &[u8],
        injects: Option<KvmiError>,
        event: &VcpuEvent,
        look: impl FnOnce(&mut Attempt<'_>, &mut Connection<std::os::fd::OwnedFd>) -> R,
    ) -> (R, Vec<Command>, Vec<u8>) {
        let mut commands = Vec::new();
        let mut last = Vec::new();
        let host = |header: &Header, payload: &[u8]| {
            let command = Command::from_id(header.id).unwrap();
            commands.push(command);
            last = payload.to_vec();
            let data = match command {
                Command::VcpuTranslateGva => {
                    let gva = u64::from_ne_bytes(payload[8..].try_into().unwrap());
                    let gpa = if gva < 0x9000 { gva } else { u64::MAX };
                    gpa.to_ne_bytes().to_vec()
                }
                Command::VmReadPhysical => {
                    let mut bytes = code.to_vec();
                    bytes.resize(payload[8].into(), 0x90);
                    bytes
                }
                Command::VcpuInjectException => match injects {
                    Some(error) => return ReplyHead::failure(header, error).as_bytes().to_vec(),
                    None => Vec::new(),
                },
                _ => Vec::new(),
            };
            let head = ReplyHead::success(header, data.len()).unwrap();
            [head.as_bytes(), &data].concat()
        };
        let mut attempt = Attempt::new(event, None, 0x5008, Access::W);
        let outcome = with_script(host, |vm| look(&mut attempt, vm));
        (outcome, commands, last)
    }

    const STORE: &[u8] = &[0x48, 0x89, 0x07]; // mov [rdi], rax
    const INC: &[u8] = &[0xfe, 0x07]; // inc byte [rdi]
    const READ: [Command; 2] = [Command::VcpuTranslateGva, Command::VmReadPhysical];

    fn hit(guarded: std::ops::Range<u64>) -> (bool, Vec<Command>) {
        let spans = Spans::new(vec![Span {
            gpa: guarded,
            gva: None,
        }]);
        let event = write(0x1000, 0x7008);
        let look = |attempt: &mut Attempt<'_>, vm: &mut Connection<_>| {
            attempt.hit(&spans, vm).unwrap().is_some()
        };
        let (hit, commands, _) = with_code(STORE, None, &event, look);
        (hit, commands)
    }

    #[test]
    fn bytes_that_are_written_are_compared_with_those_that_are_guarded() {
        // There is nothing to find out.
        assert_eq!(hit(0x4000..0x6000), (true, vec![]));
        assert_eq!(hit(0x5008..0x5009), (true, vec![]));
        assert_eq!(hit(0x5000..0x5008), (false, vec![]));
        assert_eq!(hit(0x6000..0x7000), (false, vec![]));
        // It depends on how many there are.
        assert_eq!(hit(0x500f..0x5010), (true, READ.to_vec()));
        assert_eq!(hit(0x5010..0x5011), (false, READ.to_vec()));
    }

    #[test]
    fn store_is_skipped() {
        let event = write(0x1000, 0x7008);
        let refuse =
            |attempt: &mut Attempt<'_>, vm: &mut Connection<_>| attempt.refuse(vm).unwrap();
        let (verdict, commands, payload) = with_code(STORE, None, &event, refuse);
        assert_eq!(verdict, Verdict::Skipped);
        assert_eq!(commands, [&READ[..], &[Command::VcpuSetRegisters]].concat());
        // Behind the vCPU's header, rip is the 17th register.
        assert_eq!(payload[8 + 16 * 8..][..8], 0x1003_u64.to_ne_bytes());
    }

    #[test]
    fn store_to_another_place_is_not_skipped() {
        let refuse =
            |attempt: &mut Attempt<'_>, vm: &mut Connection<_>| attempt.refuse(vm).unwrap();
        let busy = Some(KvmiError::Busy);
        let (verdict, ..) = with_code(STORE, busy, &write(0x1000, 0x7010), refuse);
        assert_eq!(verdict, Verdict::Unstoppable);
    }

    #[test]
    fn other_instructions_raise_an_exception_if_they_can() {
        let event = write(0x1000, 0x7008);
        let refuse =
            |attempt: &mut Attempt<'_>, vm: &mut Connection<_>| attempt.refuse(vm).unwrap();
        for (error, expected) in [
            (None, Verdict::Faulted),
            (Some(KvmiError::Busy), Verdict::Unstoppable),
        ] {
            let (verdict, _, payload) = with_code(INC, error, &event, refuse);
            assert_eq!(verdict, expected);
            assert_eq!(
                payload[8..],
                [13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
            );
        }
    }

    #[test]
    fn exception_that_is_not_allowed_is_an_error() {
        let event = write(0x1000, 0x7008);
        let refuse = |attempt: &mut Attempt<'_>, vm: &mut Connection<_>| attempt.refuse(vm);
        let (outcome, ..) = with_code(INC, Some(KvmiError::Perm), &event, refuse);
        assert!(matches!(outcome, Err(Error::Kvmi(KvmiError::Perm, _))));
    }

    #[test]
    fn instruction_that_cannot_be_read_raises_an_exception() {
        let refuse =
            |attempt: &mut Attempt<'_>, vm: &mut Connection<_>| attempt.refuse(vm).unwrap();
        // It would go on where nothing is mapped.
        let (verdict, commands, _) = with_code(STORE, None, &write(0x9000, 0), refuse);
        assert_eq!(verdict, Verdict::Faulted);
        let expected = [Command::VcpuTranslateGva, Command::VcpuInjectException];
        assert_eq!(commands, expected);
    }
}
