// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What is measured. A new kind of figure is a new file here, and its rows in [`all`].

pub mod command;
pub mod exit;
pub mod floor;
mod message;
pub mod pause;

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
    pub fn measure(&self, mut action: impl FnMut() -> Result<()>) -> Result<Spread> {
        self.clock.measure(self.rounds.div_ceil(10), &mut action)?;
        Ok(Spread::of(&mut self.clock.measure(self.rounds, action)?))
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
    [exit::ROWS, floor::ROWS, command::ROWS, pause::ROWS]
        .into_iter()
        .flatten()
}

/// Of a message that ends too early.
fn short() -> anyhow::Error {
    anyhow::anyhow!("a message ends too early")
}
