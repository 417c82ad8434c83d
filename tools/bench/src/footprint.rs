// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Memory of the kernel that restricted pages take.

use anyhow::{Context as _, Result};
use tiny_vm::PAGE;

use crate::{
    clock::Unit,
    figure::{Figure, Setting, Spread},
    program::Program,
    scene::Hook,
    stage::{Stage, SPARSE},
};

/// Pages that are restricted together.
pub struct Pattern {
    /// What it is called.
    pub name: &'static str,
    /// Where the first one is.
    from: u64,
    /// How many pages.
    count: u32,
    /// From one page to the next.
    distance: usize,
}

pub const DENSE: &str = "1,000,000 pages that follow each other";

/// All patterns. They do not overlap.
pub const PATTERNS: &[Pattern] = &[
    Pattern {
        name: "1,000 pages, 1 GiB apart",
        from: SPARSE + (4 << 30),
        count: 1000,
        distance: 1 << 30,
    },
    Pattern {
        name: DENSE,
        from: SPARSE,
        count: 1_000_000,
        distance: PAGE,
    },
];

/// Measures bytes per page of all patterns, in one VM: nodes that were freed would be used again,
/// unnoticed.
pub fn measure() -> Result<Vec<Figure>> {
    let stage = Stage::new(Program::TouchOut(0, SPARSE), Setting::Hooked, [])?;
    let hook = stage.hook.as_ref().context("the VM is not hooked")?;
    let figure = |pattern: &Pattern| pattern.measure(hook);
    PATTERNS.iter().map(figure).collect()
}

impl Pattern {
    fn measure(&self, hook: &Hook) -> Result<Figure> {
        let before = node_bytes()?;
        let pages = (self.from..).step_by(self.distance);
        hook.protect(pages.take(self.count as usize))?;
        let taken = node_bytes()?.saturating_sub(before);
        Ok(Figure {
            row: self.name.into(),
            setting: Setting::Hooked,
            unit: Unit::Bytes,
            spread: Spread::of(&mut [taken]).share(Spread::of(&mut [0]), self.count),
        })
    }
}

/// Bytes in nodes of XArrays.
fn node_bytes() -> Result<u64> {
    tiny_vm::tree_bytes().context("/proc/slabinfo knows no nodes of XArrays")
}
