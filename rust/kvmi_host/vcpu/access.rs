// SPDX-License-Identifier: GPL-2.0

//! Accesses that the guest is denied.

use kernel::{
    prelude::*,
    sync::atomic::Relaxed, //
};
use kvmi_abi::Event;
use zerocopy::IntoBytes;

use super::{
    work::ThreadState,
    Vcpu, //
};
use crate::kvm::{
    CurrentVcpu,
    Violation, //
};

impl Vcpu {
    fn wants(&self, violation: &Violation) -> bool {
        self.events.load(Relaxed) & Event::Pf.bit() != 0
            && (!violation.is_page_walk() || self.session.reports_page_walks())
    }

    /// Asks the tool about an access. If it does not want to be asked the access is permitted;
    /// otherwise that is decided when the event is finished. Fails only because of a signal.
    pub(super) fn report_violation(
        &self,
        thread: &mut ThreadState,
        current: &CurrentVcpu,
        violation: &Violation,
    ) -> Result {
        let asked = self.wants(violation)
            && self.raise(thread, current, Event::Pf, violation.event().as_bytes())?;
        if !asked {
            current.permit(violation);
            thread.violation = None;
        }
        Ok(())
    }
}
