// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What is aimed at, in instructions and in bytes.

use serde::Serialize;

use crate::{
    figure::Setting,
    footprint,
    report::Figures,
    rows::{command, exit, fault, floor, guest_event, mapping, pause, Row},
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
    Target {
        what: "page fault, nothing restricted : module loaded",
        limit: 1.03,
        ratio: |figures| guest(figures, fault::FAULT, fault::FAULT),
    },
    Target {
        what: "page fault, 1,000 pages restricted : module loaded",
        limit: 1.03,
        ratio: |figures| guest(figures, fault::FAULT_1K, fault::FAULT),
    },
    Target {
        what: "page fault, 1,000,000 pages restricted : module loaded",
        limit: 1.03,
        ratio: |figures| guest(figures, fault::FAULT_1M, fault::FAULT),
    },
    Target {
        what: "work, 2,000 pages restricted : module loaded",
        limit: 1.01,
        ratio: |figures| guest(figures, fault::WORK_2K, fault::WORK),
    },
    Target {
        what: "work with page faults, 2,000 pages restricted : module loaded",
        limit: 1.01,
        ratio: |figures| guest(figures, fault::FAULTING_2K, fault::FAULTING),
    },
    Target {
        what: "dearest event of what a guest does, CONTINUE : pause",
        limit: 1.3,
        ratio: dearest_event,
    },
    Target {
        what: "exit, all events on : no events",
        limit: 1.005,
        ratio: |figures| hooked(figures, guest_event::CPUID, exit::CPUID),
    },
    Target {
        what: "work, all events on : no events",
        limit: 1.005,
        ratio: |figures| hooked(figures, guest_event::WORK, fault::WORK),
    },
    Target {
        what: "reading mapped memory : own memory",
        limit: 1.05,
        ratio: |figures| hooked(figures, mapping::MAPPED, mapping::OWN),
    },
    Target {
        what: "40 times reading a mapped page : READ_PHYSICAL",
        limit: 1.0,
        ratio: |figures| Some(40.0 * hooked(figures, mapping::MAPPED, command::READ_PAGE)?),
    },
    Target {
        what: "5 times mapping one of 256 pages : a single one",
        limit: 1.0,
        ratio: |figures| Some(5.0 * hooked(figures, mapping::BULK, mapping::SINGLE)?),
    },
    Target {
        what: "bytes per restricted page, 1,000,000 of them",
        limit: 16.0,
        ratio: |figures| figures.bytes(footprint::DENSE),
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

fn hooked(figures: &Figures, row: &str, other: &str) -> Option<f64> {
    let cost = |row| figures.instructions(row, Setting::Hooked);
    Some(cost(row)? / cost(other)?)
}

/// The dearest of all kinds, if each was measured.
fn dearest_event(figures: &Figures) -> Option<f64> {
    let ratio = |row: &Row| hooked(figures, row.name, pause::PAUSE);
    let events = guest_event::EVENTS.iter();
    events
        .map(ratio)
        .try_fold(0.0, |most, one| Some(one?.max(most)))
}

/// What a guest does when it is hooked, compared with something that it does when it is not.
fn guest(figures: &Figures, row: &str, without: &str) -> Option<f64> {
    let hooked = figures.instructions(row, Setting::Hooked)?;
    Some(hooked / figures.instructions(without, Setting::Loaded)?)
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
