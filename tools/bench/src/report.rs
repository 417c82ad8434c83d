// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tables of what was measured, in Markdown, and all of it as JSON.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use comfy_table::{presets::ASCII_MARKDOWN, CellAlignment, Table};
use serde::Serialize;

use crate::{
    clock::Unit,
    figure::{Figure, Setting, Spread},
    footprint, rows,
    targets::{self, Outcome},
};

/// All figures.
#[derive(Default, Serialize)]
#[serde(transparent)]
pub struct Figures(Vec<Figure>);

impl Figures {
    /// Reads the outputs of `measure`.
    fn read(files: &[PathBuf]) -> Result<Self> {
        let mut figures = Self::default();
        for file in files {
            let name = file.display();
            let text = fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?;
            figures.add(&text).with_context(|| name.to_string())?;
        }
        Ok(figures)
    }

    /// Adds the figures of one output.
    pub fn add(&mut self, text: &str) -> Result<()> {
        // The lab says when it has started a stalled emulator anew.
        for line in text.lines().filter(|line| !line.starts_with("lab: ")) {
            let figure =
                serde_json::from_str(line).with_context(|| format!("no figure: {line}"))?;
            self.0.push(figure);
        }
        Ok(())
    }

    /// The executed instructions, if they were counted.
    pub fn instructions(&self, row: &str, setting: Setting) -> Option<f64> {
        let spread = self.find(row, setting, Unit::Instructions)?;
        Some(spread.median)
    }

    /// Bytes of the kernel's memory, if they were counted.
    pub fn bytes(&self, row: &str) -> Option<f64> {
        Some(self.find(row, Setting::Hooked, Unit::Bytes)?.median)
    }

    /// The time in nanoseconds, if it was measured: the best, as others use the machine, too.
    pub fn time(&self, row: &str, setting: Setting) -> Option<f64> {
        Some(self.find(row, setting, Unit::Ns)?.min)
    }

    fn find(&self, row: &str, setting: Setting, unit: Unit) -> Option<&Spread> {
        let is_it = |f: &&Figure| (f.row.as_str(), f.setting, f.unit) == (row, setting, unit);
        // The last one, for whatever was started anew.
        Some(&self.0.iter().rfind(is_it)?.spread)
    }
}

/// All of it.
#[derive(Serialize)]
struct Report<'a> {
    figures: &'a Figures,
    targets: &'a [Outcome],
}

/// Prints tables of the outputs of `measure`, and writes all to `json`.
pub fn report(files: &[PathBuf], json: Option<&Path>) -> Result<()> {
    let figures = Figures::read(files)?;
    let targets = targets::outcomes(&figures);
    println!(
        "{}\n\n{}\n\n{}",
        figures_table(&figures),
        memory_table(&figures),
        targets_table(&targets)
    );
    if let Some(path) = json {
        let report = Report {
            figures: &figures,
            targets: &targets,
        };
        fs::write(path, serde_json::to_string_pretty(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn table(header: Vec<String>) -> Table {
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// One line for each row: instructions everywhere, and the time that it takes when hooked.
fn figures_table(figures: &Figures) -> Table {
    let mut header = vec![String::from("instructions")];
    header.extend(Setting::ALL.map(|setting| setting.title().into()));
    header.push("time, hooked".into());
    let mut table = table(header);
    for row in rows::all() {
        let mut line = vec![String::from(row.name)];
        for setting in Setting::ALL {
            let figure = figures.instructions(row.name, setting);
            line.push(figure.map_or(String::new(), |count| format!("{count:.0}")));
        }
        let ns = figures.time(row.name, Setting::Hooked);
        line.push(ns.map_or(String::new(), duration));
        table.add_row(line);
    }
    table
}

/// Nanoseconds for people; nothing if they are lost in the noise of what was subtracted.
fn duration(ns: f64) -> String {
    match ns / 1000.0 {
        us if us < 0.0 => String::new(),
        us if us < 10.0 => format!("{us:.1} µs"),
        us => format!("{us:.0} µs"),
    }
}

fn memory_table(figures: &Figures) -> Table {
    let header = ["restricted pages", "bytes for each"];
    let mut table = table(header.map(String::from).into());
    for pattern in footprint::PATTERNS {
        let bytes = figures.bytes(pattern.name);
        let bytes = bytes.map_or(String::new(), |bytes| format!("{bytes:.1}"));
        table.add_row([String::from(pattern.name), bytes]);
    }
    table
}

fn targets_table(targets: &[Outcome]) -> Table {
    let header = ["target", "at most", "is", ""];
    let mut table = table(header.map(String::from).into());
    for target in targets {
        table.add_row([
            String::from(target.what),
            format!("{:.3}", target.limit),
            format!("{:.4}", target.ratio),
            String::from(if target.met { "met" } else { "not met" }),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::exit;

    fn line(setting: &str, unit: &str, median: u32) -> String {
        let row = exit::CPUID;
        format!(
            r#"{{"row":"{row}","setting":"{setting}","unit":"{unit}","min":{min},"median":{median},"p90":{median},"rounds":9}}"#,
            min = median - 1
        )
    }

    #[test]
    fn figures_are_told_apart_by_setting_and_unit() {
        let mut figures = Figures::default();
        figures.add(&line("stock", "instructions", 2000)).unwrap();
        figures.add(&line("stock", "ns", 30000)).unwrap();
        let found = |setting| figures.instructions(exit::CPUID, setting);
        assert_eq!(found(Setting::Stock), Some(2000.0));
        assert_eq!(found(Setting::Hooked), None);
        assert_eq!(figures.time(exit::CPUID, Setting::Stock), Some(29999.0));
    }

    #[test]
    fn figures_of_a_run_that_was_started_anew_replace_the_first() {
        let (first, second) = (line("stock", "ns", 10), line("stock", "ns", 20));
        let mut figures = Figures::default();
        figures
            .add(&format!("{first}\nlab: emulator stalled\n{second}\n"))
            .unwrap();
        assert_eq!(figures.time(exit::CPUID, Setting::Stock), Some(19.0));
        assert!(figures.add("kvmi_bench: cannot measure").is_err());
    }

    #[test]
    fn targets_are_met_up_to_their_limit() {
        let met = |patched| {
            let mut figures = Figures::default();
            figures.add(&line("stock", "instructions", 1000)).unwrap();
            figures
                .add(&line("unloaded", "instructions", patched))
                .unwrap();
            let outcomes = targets::outcomes(&figures);
            assert_eq!(outcomes.len(), 1, "those without figures are left out");
            outcomes[0].met
        };
        assert!(met(1005));
        assert!(!met(1006));
    }
}
