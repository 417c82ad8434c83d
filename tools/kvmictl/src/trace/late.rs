// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Names of places in a kernel that the guest may yet have to boot.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::Result;
use kvmi_client::{symbols::Symbols, Connection, Paused, VcpuEvent};

use crate::symbols;

/// How long a kernel that was not found is not looked for: it may be in the middle of its boot.
const PATIENCE: Duration = Duration::from_millis(200);

/// The names, as far as they are known.
pub struct Names {
    known: symbols::Names,
    /// Those of a kernel that the guest does not have so far, and when to look for it again.
    pending: Option<(Symbols, Instant)>,
}

/// Whether a vCPU has been told where system calls lead to, as Linux does early in its boot.
fn has_booted(event: &VcpuEvent) -> bool {
    event.arch.msrs.lstar != 0
}

impl Names {
    /// Finds out where a guest has its kernel. If no vCPU runs one yet, that is to be done later,
    /// unless the names are `needed` now.
    pub fn locate<S: AsFd>(
        symbols: Option<Symbols>,
        paused: &mut Paused<'_, S>,
        needed: bool,
    ) -> Result<Self> {
        match symbols {
            Some(symbols) if !needed && !paused.vcpus().iter().any(has_booted) => Ok(Self {
                known: symbols::Names::none(),
                pending: Some((symbols, Instant::now())),
            }),
            symbols => Ok(Self {
                known: symbols::Names::locate_paused(symbols, paused)?,
                pending: None,
            }),
        }
    }

    /// Looks for the kernel, if it was not there so far, through a vCPU that waits for the reply to
    /// an event.
    pub fn look_again<S: AsFd>(&mut self, vm: &mut Connection<S>, event: &VcpuEvent) {
        let Some((symbols, again)) = &mut self.pending else {
            return;
        };
        let now = Instant::now();
        if !has_booted(event) || now < *again {
            return;
        }
        // Whatever the reason is if it is not found: there may be a better moment.
        match symbols::Names::locate(Some(symbols.clone()), vm, &[event.vcpu]) {
            Ok(names) => {
                self.known = names;
                self.pending = None;
            }
            Err(_) => *again = now + PATIENCE,
        }
    }

    /// Those that are known now.
    pub fn known(&self) -> &symbols::Names {
        &self.known
    }
}
