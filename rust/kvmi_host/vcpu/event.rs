// SPDX-License-Identifier: GPL-2.0

//! What the guest is about to do.

use kernel::{
    prelude::*,
    sync::atomic::Relaxed,
    time::{
        Instant,
        Monotonic, //
    }, //
};
use kvmi_abi::{
    Event,
    KvmiError, //
};

use super::{
    work::ThreadState,
    Vcpu, //
};
use crate::{
    kvm::{
        CurrentVcpu,
        GuestEvent, //
    },
    module_parameters, //
};

/// The privilege level of user mode.
const USER: u8 = 3;

/// How often user mode of the guest has called the tool: it must not keep it busy.
pub(super) struct CallLimit {
    /// When the second in question began.
    since: Instant<Monotonic>,
    /// Calls in that second.
    calls: u32,
}

impl CallLimit {
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            calls: 0,
        }
    }

    /// Counts a call, and returns whether it is one too many if there may be `rate` in a second.
    fn exceeds(&mut self, rate: u32) -> bool {
        if self.since.elapsed().as_millis() >= 1000 {
            *self = Self::new();
        }
        self.calls = self.calls.saturating_add(1);
        rate != 0 && self.calls > rate
    }
}

impl Vcpu {
    /// Switches an event on or off. PAUSE, TRAP and SINGLESTEP are sent because of their commands,
    /// whatever is said here. For the vCPU's thread only.
    pub(crate) fn control_event(
        &self,
        current: &CurrentVcpu,
        event: Event,
        enable: bool,
    ) -> Result<(), KvmiError> {
        current.track(event, enable)?;
        let events = self.events.load(Relaxed);
        let events = if enable {
            events | event.bit()
        } else {
            events & !event.bit()
        };
        self.events.store(events, Relaxed);
        Ok(())
    }

    /// Asks the tool about what the guest is about to do. What is then done is decided when the event
    /// is finished; without a tool, the guest does what it likes, and a call returns that nobody takes
    /// it. Fails only because of a signal.
    pub(super) fn report(
        &self,
        thread: &mut ThreadState,
        current: &CurrentVcpu,
        event: &GuestEvent,
    ) -> Result {
        let denied = event.event() == Event::Hypercall && event.cpl() == USER && !may_call(thread);
        if denied || !self.raise(thread, current, event.event(), event.specific().as_bytes())? {
            current.decide(event);
            thread.guest_event = None;
        }
        Ok(())
    }
}

fn may_call(thread: &mut ThreadState) -> bool {
    *module_parameters::hypercall_user.value() != 0
        && !thread
            .calls
            .exceeds(*module_parameters::hypercall_rate.value())
}
