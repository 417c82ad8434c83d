// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What is measured. A new kind of figure is a new file here, and its rows in [`all`].

pub mod access;
pub mod command;
mod event;
pub mod exit;
pub mod fault;
pub mod floor;
pub mod guest_event;
pub mod mapping;
mod message;
pub mod pause;
pub mod violation;

use anyhow::Result;

use crate::{
    clock::Clock,
    figure::{Setting, Spread},
};

/// How to measure.
pub struct Bench<'a> {
    /// With what.
    pub clock: &'a Clock,
    /// How often.
    pub rounds: usize,
    /// Where.
    pub setting: Setting,
}

impl Bench<'_> {
    /// What doing something costs, once all caches are warm.
    pub fn measure(&self, action: impl FnMut() -> Result<()>) -> Result<Spread> {
        self.measure_after(|| Ok(()), action)
    }

    /// The same, with something before each time that does not count.
    pub fn measure_after(
        &self,
        mut before: impl FnMut() -> Result<()>,
        mut action: impl FnMut() -> Result<()>,
    ) -> Result<Spread> {
        let warm_up = self.rounds.div_ceil(10);
        self.clock
            .measure_after(warm_up, &mut before, &mut action)?;
        let mut costs = self.clock.measure_after(self.rounds, before, action)?;
        Ok(Spread::of(&mut costs))
    }

    /// For what takes so many times as long as others: as many times fewer rounds.
    pub fn fewer_rounds(&self, part: usize) -> Self {
        Self {
            rounds: self.rounds.div_ceil(part),
            ..*self
        }
    }
}

/// One thing that is measured.
pub struct Row {
    /// What, as in tables.
    pub name: &'static str,
    /// Where it makes sense.
    pub settings: &'static [Setting],
    /// Measures it.
    pub run: fn(&Bench<'_>) -> Result<Spread>,
}

impl Row {
    /// Something that is measured everywhere.
    const fn everywhere(name: &'static str, run: fn(&Bench<'_>) -> Result<Spread>) -> Self {
        Self {
            name,
            settings: &Setting::ALL,
            run,
        }
    }

    /// Something that needs a hooked VM, or is compared with what does.
    const fn hooked(name: &'static str, run: fn(&Bench<'_>) -> Result<Spread>) -> Self {
        Self {
            name,
            settings: &[Setting::Hooked],
            run,
        }
    }
}

/// Everything, in the order of the table.
pub fn all() -> impl Iterator<Item = &'static Row> {
    [
        exit::ROWS,
        fault::ROWS,
        floor::ROWS,
        command::ROWS,
        pause::ROWS,
        access::ROWS,
        violation::ROWS,
        guest_event::ROWS,
        guest_event::EVENTS,
        mapping::ROWS,
    ]
    .into_iter()
    .flatten()
}

/// Of a message that ends too early.
fn short() -> anyhow::Error {
    anyhow::anyhow!("a message ends too early")
}
