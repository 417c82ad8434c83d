// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmi_bench`: what introspection costs.
//!
//! `measure` runs on the host whose kernel is in question, once per [`Setting`] and [`Unit`], and
//! prints one line of JSON per figure, as `memory` does. `report` makes tables of the lines of all
//! runs.

mod act;
mod clock;
mod figure;
mod footprint;
mod memory;
mod program;
mod report;
mod rows;
mod scene;
mod stage;
mod targets;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{ensure, Context as _, Result};
use clap::{Parser, Subcommand};

use clock::{Clock, Unit};
use figure::{Figure, Setting};

/// Measures what introspection costs.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measures on this host and prints lines of JSON.
    Measure {
        /// What kernel this is, and whether VMs are to be hooked.
        #[arg(long, value_enum)]
        setting: Setting,
        /// What to count.
        #[arg(long, value_enum)]
        unit: Unit,
        /// How often each thing is done; half of the figures are below what is reported.
        #[arg(long, default_value_t = 1000)]
        rounds: usize,
        /// Measures only what has this in its name.
        #[arg(long, default_value = "")]
        row: String,
    },
    /// Measures memory that the kernel takes for hooked VMs, and prints lines of JSON.
    Memory,
    /// Prints tables of what was measured.
    Report {
        /// Outputs of `measure` and `memory`.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Writes all figures and targets to this file.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Has a page of memory that others read.
    #[command(hide = true)]
    HoldMemory,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Measure {
            setting,
            unit,
            rounds,
            row,
        } => measure(setting, unit, rounds, &row),
        Command::Memory => footprint(),
        Command::Report { files, json } => report::report(&files, json.as_deref()),
        Command::HoldMemory => memory::hold(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvmi_bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(setting: Setting, unit: Unit, rounds: usize, part: &str) -> Result<()> {
    ensure!(rounds > 0, "--rounds has to be at least 1");
    scene::check(setting)?;
    scene::pin(scene::TOOL_CPU)?;
    let clock = Clock::new(unit)?;
    let chosen = |row: &&rows::Row| row.settings.contains(&setting) && row.name.contains(part);
    for row in rows::all().filter(chosen) {
        let bench = rows::Bench {
            clock: &clock,
            rounds,
            setting,
        };
        let spread = (row.run)(&bench).with_context(|| format!("cannot measure '{}'", row.name))?;
        let figure = Figure {
            row: row.name.into(),
            setting,
            unit,
            spread,
        };
        println!("{}", serde_json::to_string(&figure)?);
    }
    Ok(())
}

fn footprint() -> Result<()> {
    scene::check(Setting::Hooked)?;
    for figure in footprint::measure()? {
        println!("{}", serde_json::to_string(&figure)?);
    }
    Ok(())
}
