// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What is aimed at, in instructions.

use serde::Serialize;

use crate::{
    figure::Setting,
    report::Figures,
    rows::{command, exit, floor, pause},
};

/// A ratio that has a limit.
struct Target {
    what: &'static str,
    limit: f64,
    ratio: fn(&Figures) -> Option<f64>,
}

const TARGETS: &[Target] = &[
    Target {
        what: "exit, patched : stock",
        limit: 1.005,
        ratio: |figures| exits(figures, Setting::Unloaded),
    },
    Target {
        what: "exit, module loaded : stock",
        limit: 1.005,
        ratio: |figures| exits(figures, Setting::Loaded),
    },
    Target {
        what: "exit, hooked without events : stock",
        limit: 1.02,
        ratio: |figures| exits(figures, Setting::Hooked),
    },
    Target {
        what: "GET_REGISTERS : AF_UNIX across CPUs and an exit",
        limit: 1.5,
        ratio: |figures| round_trip(figures, command::GET_REGISTERS, floor::GET_REGISTERS),
    },
    Target {
        what: "pause : AF_UNIX across CPUs and an exit",
        limit: 1.5,
        ratio: |figures| round_trip(figures, pause::PAUSE, floor::PAUSE),
    },
];

fn exits(figures: &Figures, setting: Setting) -> Option<f64> {
    let cost = |setting| figures.instructions(exit::CPUID, setting);
    Some(cost(setting)? / cost(Setting::Stock)?)
}

fn round_trip(figures: &Figures, row: &str, floor: &str) -> Option<f64> {
    let cost = |row| figures.instructions(row, Setting::Hooked);
    Some(cost(row)? / (cost(floor)? + cost(exit::CPUID)?))
}

/// What became of a target.
#[derive(Serialize)]
pub struct Outcome {
    /// Which ratio.
    pub what: &'static str,
    /// What it should not exceed.
    pub limit: f64,
    /// What it is.
    pub ratio: f64,
    /// Whether it does not exceed that.
    pub met: bool,
}

/// The outcomes of all targets for which there are figures.
pub fn outcomes(figures: &Figures) -> Vec<Outcome> {
    let outcome = |target: &Target| {
        let ratio = (target.ratio)(figures)?;
        Some(Outcome {
            what: target.what,
            limit: target.limit,
            ratio,
            met: ratio <= target.limit,
        })
    };
    TARGETS.iter().filter_map(outcome).collect()
}
