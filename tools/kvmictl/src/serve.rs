// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Serving the events of a VM until it is time to stop.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::Result;
use kvmi_client::{Connection, Error, Event, KvmiError, VcpuEvent};

use crate::{
    cli::Until,
    session::Session,
    wait::{End, Waiter},
};

/// How often to look for vCPUs that the guest has started meanwhile, or has got.
const LOOK: Duration = Duration::from_secs(1);

/// Why no more events are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The VM has ended.
    VmEnded,
    /// Whoever has hooked the VM is about to unhook it.
    Unhook,
    /// This process was told to end.
    Signal,
    /// There have been as many as were asked for.
    Count,
    /// The time is over.
    Time,
}

impl Stop {
    /// It in a word, for programs.
    pub fn reason(self) -> &'static str {
        match self {
            Self::VmEnded => "vm",
            Self::Unhook => "unhook",
            Self::Signal => "signal",
            Self::Count => "count",
            Self::Time => "timeout",
        }
    }
}

/// Who decides about events.
pub trait Handler {
    /// Switches events on on vCPUs where they are not yet.
    fn look_for_vcpus(&mut self, vm: &mut Connection<OwnedFd>) -> Result<(), Error>;

    /// Replies to an event.
    fn handle(&mut self, vm: &mut Connection<OwnedFd>, event: &VcpuEvent) -> Result<()>;

    /// How many there have been of those that count.
    fn count(&self) -> u64;
}

/// Has a handler reply to events until it is time to stop; the time counts from `begun` on.
pub fn serve(
    handler: &mut impl Handler,
    vm: &mut Connection<OwnedFd>,
    waiter: &Waiter,
    until: Until,
    begun: Instant,
) -> Result<Stop> {
    let mut looked = Instant::now();
    loop {
        let event = vm.try_event()?;
        let idle = event.is_none();
        match event {
            Some(Event::Vcpu(event)) => handler.handle(vm, &event)?,
            Some(Event::Unhook { .. }) => return Ok(Stop::Unhook),
            _ => {}
        }
        // One event may count more than once.
        if until.count.is_some_and(|count| handler.count() >= count) {
            return Ok(Stop::Count);
        }
        let left = until
            .duration
            .map(|time| time.saturating_sub(begun.elapsed()));
        if left == Some(Duration::ZERO) {
            return Ok(Stop::Time);
        }
        if looked.elapsed() >= LOOK {
            handler.look_for_vcpus(vm)?;
            looked = Instant::now();
        }
        let pause = if idle {
            left.map_or(LOOK, |left| left.min(LOOK))
        } else {
            Duration::ZERO
        };
        match waiter.wait_for_message(Some(pause))? {
            // There are more events, or it is time to look.
            None | Some(End::Timeout) => {}
            Some(End::Signal) => return Ok(Stop::Signal),
            Some(End::VmEnded | End::ToolHungUp) => return Ok(Stop::VmEnded),
        }
    }
}

/// Says why serving has stopped: an error may be the end of the VM.
pub fn judge(outcome: Result<Stop>, waiter: &Waiter) -> Result<Stop> {
    match outcome {
        Err(error) if is_closed(&error) && waiter.vmm_has_ended()? => Ok(Stop::VmEnded),
        outcome => outcome,
    }
}

/// Unhooks a VM, unless there is nothing left to unhook. Restrictions and events end with that, and
/// whoever waits for a reply goes on.
pub fn close(session: Session, stop: Stop) -> Result<()> {
    match stop {
        Stop::VmEnded => Ok(()),
        _ => session.close(),
    }
}

/// Whether the connection is over.
pub fn is_closed(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<Error>(),
        Some(Error::Closed | Error::Unusable)
    )
}

/// The vCPUs of a VM, as far as is known.
#[derive(Debug, Default)]
pub struct Roster {
    /// How many there are.
    known: u16,
    /// Those of them that the guest has not started.
    dormant: Vec<u16>,
    /// Those that matter, if not all of them do.
    only: Option<Vec<u16>>,
}

impl Roster {
    /// One where only some vCPUs matter, or all of them.
    pub fn of(only: Option<Vec<u16>>) -> Self {
        Self {
            only,
            ..Self::default()
        }
    }

    /// Prepares vCPUs that are not yet. Those that the guest has not started refuse, and are tried
    /// the next time.
    pub fn prepare(
        &mut self,
        vm: &mut Connection<OwnedFd>,
        mut prepare: impl FnMut(&mut Connection<OwnedFd>, u16) -> Result<(), Error>,
    ) -> Result<(), Error> {
        // Indices have 16 bits.
        let count = u16::try_from(vm.get_info()?.vcpu_count).unwrap_or(u16::MAX);
        let new = self.known..count;
        self.known = count;
        let mut dormant = Vec::new();
        for vcpu in std::mem::take(&mut self.dormant).into_iter().chain(new) {
            if self.only.as_ref().is_some_and(|only| !only.contains(&vcpu)) {
                continue;
            }
            match prepare(vm, vcpu) {
                Ok(()) => {}
                Err(Error::Kvmi(KvmiError::Again, _)) => dormant.push(vcpu),
                Err(error) => return Err(error),
            }
        }
        self.dormant = dormant;
        Ok(())
    }

    /// The vCPUs that the guest has not started.
    pub fn dormant(&self) -> &[u16] {
        &self.dormant
    }

    /// The vCPUs that are there, started or not.
    pub fn all(&self) -> std::ops::Range<u16> {
        0..self.known
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::with_script;
    use kvmi_client::{
        abi::wire::{Header, ReplyHead},
        Command, EventId,
    };

    /// What a roster of `only` asks about, in VMs that have some vCPUs of which some are dormant.
    fn asked(only: Option<Vec<u16>>, looks: &[(u8, &[u16])]) -> Vec<Vec<u16>> {
        let mut roster = Roster::of(only);
        let mut asked = Vec::new();
        for (vcpus, dormant) in looks {
            let mut seen = Vec::new();
            let host = |header: &Header, payload: &[u8]| {
                if header.id == Command::VmGetInfo.id() {
                    let head = ReplyHead::success(header, 16).unwrap();
                    let mut info = [0; 16];
                    info[0] = *vcpus;
                    return [head.as_bytes(), &info].concat();
                }
                let vcpu = u16::from_ne_bytes([payload[0], payload[1]]);
                assert_eq!(header.id, Command::VcpuControlEvents.id());
                assert_eq!(payload[8..], [17, 0, 1, 0, 0, 0, 0, 0]);
                seen.push(vcpu);
                if dormant.contains(&vcpu) {
                    let head = ReplyHead::failure(header, KvmiError::Again);
                    return head.as_bytes().to_vec();
                }
                ReplyHead::success(header, 0).unwrap().as_bytes().to_vec()
            };
            with_script(host, |vm| {
                roster.prepare(vm, |vm, vcpu| {
                    vm.vcpu_control_events(vcpu, EventId::Pf, true)
                })
            })
            .unwrap();
            assert_eq!(roster.all(), 0..u16::from(*vcpus));
            asked.push(seen);
        }
        asked
    }

    #[test]
    fn vcpus_are_prepared_when_they_are_started_or_added() {
        let looks: [(u8, &[u16]); 5] = [(2, &[1]), (2, &[1]), (4, &[3]), (4, &[]), (4, &[])];
        let expected = [vec![0, 1], vec![1], vec![1, 2, 3], vec![3], vec![]];
        assert_eq!(asked(None, &looks), expected);
    }

    #[test]
    fn vcpus_that_do_not_matter_are_left_alone() {
        let looks: [(u8, &[u16]); 3] = [(2, &[1]), (4, &[3]), (4, &[])];
        let expected = [vec![1], vec![1, 3], vec![3]];
        assert_eq!(asked(Some(vec![1, 3]), &looks), expected);
    }
}
