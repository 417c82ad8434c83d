// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What is counted: executed instructions, or time.

use std::{
    arch::{asm, x86_64::_rdtsc},
    time::Instant,
};

use anyhow::{ensure, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::figure::Spread;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Executed instructions of all CPUs, on an emulator whose TSC counts those.
    Instructions,
    /// Nanoseconds.
    Ns,
    /// Bytes of the kernel's memory: nothing that a clock counts.
    #[value(skip)]
    Bytes,
}

/// Counts.
pub struct Clock {
    unit: Unit,
    start: Instant,
    /// What reading it twice costs.
    overhead: u64,
}

/// Instructions of the loop that shows whether the TSC counts instructions.
const KNOWN: u64 = 200_000;

impl Clock {
    /// Gets ready to count. Fails if instructions are asked for and the TSC does not count them.
    pub fn new(unit: Unit) -> Result<Self> {
        let mut clock = Self {
            unit,
            start: Instant::now(),
            overhead: 0,
        };
        let pair = Spread::of(&mut clock.measure(1000, || Ok(()))?);
        // Lossless: a whole number, as each of the values was.
        clock.overhead = pair.median as u64;
        if unit == Unit::Instructions {
            let mut counts = clock.measure(20, || {
                known_loop(KNOWN / 2);
                Ok(())
            })?;
            let counted = Spread::of(&mut counts).median;
            // Setting up the loop takes a few; interrupts take thousands, but not each time.
            ensure!(
                (counted - KNOWN as f64).abs() < 10.0,
                "the TSC does not count instructions: {counted} for {KNOWN} of them; \
                 'lab run --icount' makes it do so"
            );
        }
        Ok(clock)
    }

    fn now(&self) -> u64 {
        match self.unit {
            // SAFETY: every x86-64 processor has the instruction.
            Unit::Instructions => unsafe { _rdtsc() },
            _ => u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// Does something `rounds` times and returns what each time has cost.
    pub fn measure(&self, rounds: usize, action: impl FnMut() -> Result<()>) -> Result<Vec<u64>> {
        self.measure_after(rounds, || Ok(()), action)
    }

    /// The same, with something before each time that does not count.
    pub fn measure_after(
        &self,
        rounds: usize,
        mut before: impl FnMut() -> Result<()>,
        mut action: impl FnMut() -> Result<()>,
    ) -> Result<Vec<u64>> {
        let mut costs = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            before()?;
            let begin = self.now();
            action()?;
            let cost = self.now().saturating_sub(begin);
            costs.push(cost.saturating_sub(self.overhead));
        }
        Ok(costs)
    }
}

/// Executes two instructions per round, and few more.
fn known_loop(rounds: u64) {
    // SAFETY: it changes nothing but the register and the flags.
    unsafe {
        asm!("2: dec {0}", "jnz 2b", inout(reg) rounds => _, options(nomem, nostack));
    }
}
