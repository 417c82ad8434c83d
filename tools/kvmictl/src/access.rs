// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl access`

use std::ops::Range;

use anyhow::Result;
use kvmi_client::{device::Device, Access, PAGE_SIZE};
use serde::Serialize;

use crate::{
    cli,
    output::{gpa, size, Output},
    select,
    table::Table,
};

/// Pages that follow each other, as they are printed as JSON.
#[derive(Serialize)]
struct Run {
    from: String,
    to: String,
    pages: u64,
    access: String,
}

/// Lists what a guest may not do with its pages.
pub fn run(arguments: &cli::AccessList, output: &mut Output) -> Result<()> {
    let (_, target) = select::target(&arguments.vm)?;
    let runs = target.restricted(&Device::open()?)?;
    if output.is_json() {
        let runs: Vec<Run> = runs.iter().map(Run::from).collect();
        return Ok(output.json(&runs)?);
    }
    if runs.is_empty() {
        return Ok(output.line("no page is restricted")?);
    }
    Ok(output.line(table(&runs))?)
}

fn table(runs: &[(Range<u64>, Access)]) -> Table {
    let mut table = Table::new(&["FROM", "TO", "SIZE", "ACCESS"]);
    for (pages, access) in runs {
        let size = size(pages.end - pages.start);
        table.add([gpa(pages.start), gpa(pages.end), size, access.to_string()]);
    }
    table.align_right(&[0, 1, 2])
}

impl From<&(Range<u64>, Access)> for Run {
    fn from((pages, access): &(Range<u64>, Access)) -> Self {
        Self {
            from: gpa(pages.start),
            to: gpa(pages.end),
            pages: (pages.end - pages.start) / PAGE_SIZE,
            access: access.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_both_ends_and_what_is_allowed() {
        let runs = [
            (0x1000..0x3000, Access::R | Access::X),
            (0x8000..0x9000, Access::R),
        ];
        let text = table(&runs).to_string();
        let lines: Vec<_> = text.lines().collect();
        assert!(
            lines[1].contains("0x3000") && lines[1].ends_with("r-x"),
            "{text}"
        );
        assert_eq!(lines.len(), 3);
        let run = Run::from(&runs[0]);
        assert_eq!((run.pages, run.access.as_str()), (2, "r-x"));
    }
}
