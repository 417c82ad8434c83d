// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A VM that stands still.

use std::{
    mem,
    ops::{Deref, DerefMut},
    os::fd::AsFd,
    time::Duration,
};

use kvmi_abi::{vcpu_request::Action, KvmiError};

use crate::{
    connection::Connection,
    error::{Error, Result},
    event::{Event, VcpuEvent, VcpuEventKind},
    io::Deadline,
};

/// A VM whose vCPUs are all paused; dropping it lets them run on.
///
/// Commands can be given through it as through the connection itself.
#[derive(Debug)]
#[must_use = "the VM runs on as soon as this is dropped"]
pub struct Paused<'a, S: AsFd> {
    vm: &'a mut Connection<S>,
    stopped: Vec<VcpuEvent>,
    dormant: Vec<u16>,
}

impl<S: AsFd> Connection<S> {
    /// Pauses all vCPUs, which altogether may take as long as `timeout`. Needs the PAUSE event to be
    /// allowed.
    ///
    /// A vCPU that waits for the reply to another event cannot be paused: reply first. If one does
    /// not pause in time the error is [`Error::NotPaused`], and the connection is given up, since
    /// nothing else would take back the request.
    pub fn pause_all(&mut self, timeout: Duration) -> Result<Paused<'_, S>> {
        let mut paused = Paused {
            vm: self,
            stopped: Vec::new(),
            dormant: Vec::new(),
        };
        match paused.stop(Deadline::after(Some(timeout))) {
            Ok(()) => Ok(paused),
            // Dropping `paused` lets those run on that have paused by now.
            Err(error) => {
                if !error.is_recoverable() {
                    paused.vm.hang_up();
                }
                Err(error)
            }
        }
    }

    /// Asks a vCPU to pause, unless the guest has not started it.
    fn pause_started(&mut self, vcpu: u16) -> Result<bool> {
        match self.vcpu_info(vcpu) {
            Err(Error::Kvmi(KvmiError::Again, _)) => return Ok(false),
            // Another refusal does not tell; pausing will.
            Ok(_) | Err(Error::Kvmi(..)) => {}
            Err(error) => return Err(error),
        }
        match self.pause_vcpu(vcpu, true) {
            Ok(()) => Ok(true),
            Err(Error::Kvmi(KvmiError::Again, _)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl<S: AsFd> Paused<'_, S> {
    /// What the vCPUs were doing when they were paused, in the order of their indices. Those that
    /// the guest has not started are not among them.
    pub fn vcpus(&self) -> &[VcpuEvent] {
        &self.stopped
    }

    /// Indices of the vCPUs that the guest has not started, and which it cannot start now.
    pub fn dormant(&self) -> &[u16] {
        &self.dormant
    }

    /// Takes a vCPU out of those that run on later: the reply to its event is up to the caller now.
    /// Nothing if it is not one of [`Self::vcpus`].
    pub fn take(&mut self, vcpu: u16) -> Option<VcpuEvent> {
        let at = self.stopped.iter().position(|event| event.vcpu == vcpu)?;
        Some(self.stopped.remove(at))
    }

    /// Lets the vCPUs run on. Dropping does the same but tells no error.
    pub fn resume(mut self) -> Result<()> {
        self.release()
    }

    fn stop(&mut self, deadline: Deadline) -> Result<()> {
        let count = self.vm.get_info()?.vcpu_count;
        // Indices have 16 bits.
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        let mut left: Vec<u16> = (0..count).collect();
        loop {
            // A vCPU that is not started does nothing, and would pause as soon as it is, which may
            // be never. But those that still run may start it, so look again when they are stopped.
            let before = left.len();
            left = self.stop_started(&left, deadline)?;
            if left.is_empty() || left.len() == before {
                break;
            }
        }
        self.stopped.sort_by_key(|event| event.vcpu);
        self.dormant = left;
        Ok(())
    }

    /// Stops those of `vcpus` that are started, and returns the others.
    fn stop_started(&mut self, vcpus: &[u16], deadline: Deadline) -> Result<Vec<u16>> {
        let mut asked = Vec::new();
        let mut dormant = Vec::new();
        let mut refused = Ok(());
        for vcpu in vcpus {
            match self.vm.pause_started(*vcpu) {
                Ok(true) => asked.push(*vcpu),
                Ok(false) => dormant.push(*vcpu),
                Err(error) if error.is_recoverable() => {
                    refused = Err(error);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        // Whatever was refused, those that were asked to pause are going to.
        self.collect(asked, deadline)?;
        refused.map(|()| dormant)
    }

    /// Waits until those of `asked` have paused.
    fn collect(&mut self, mut asked: Vec<u16>, deadline: Deadline) -> Result<()> {
        while let Some(first) = asked.first().copied() {
            let event = self
                .vm
                .wait_for_event_until(deadline, |event| is_pause(event, &asked));
            let event = event.map_err(|error| match error {
                Error::Timeout => Error::NotPaused(first),
                error => error,
            })?;
            if let Event::Vcpu(event) = event {
                asked.retain(|vcpu| *vcpu != event.vcpu);
                self.stopped.push(*event);
            }
        }
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        for event in mem::take(&mut self.stopped) {
            let replied = self.vm.reply_event(&event, Action::Continue);
            // A guest that stands still for ever would be worse than a connection lost.
            replied.inspect_err(|_| self.vm.hang_up())?;
        }
        Ok(())
    }
}

/// Whether an event says that one of `vcpus` has paused.
fn is_pause(event: &Event, vcpus: &[u16]) -> bool {
    match event {
        Event::Vcpu(event) => event.kind == VcpuEventKind::Pause && vcpus.contains(&event.vcpu),
        _ => false,
    }
}

impl<S: AsFd> Drop for Paused<'_, S> {
    fn drop(&mut self) {
        let _ = self.release();
    }
}

impl<S: AsFd> Deref for Paused<'_, S> {
    type Target = Connection<S>;

    fn deref(&self) -> &Self::Target {
        self.vm
    }
}

impl<S: AsFd> DerefMut for Paused<'_, S> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.vm
    }
}
