// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a guest pays for restrictions of pages that it does not access.

use anyhow::Result;

use super::{exit, Bench, Row};
use crate::{
    figure::Spread,
    program::{Program, CODE},
    stage::{pages, Stage, PLENTY, PLENTY_PAGES, SPARSE},
};

pub const FAULT: &str = "page fault of the guest";
pub const FAULT_1K: &str = "page fault, 1,000 pages restricted";
pub const FAULT_1M: &str = "page fault, 1,000,000 pages restricted";
pub const FAULT_BESIDE: &str = "page fault, 312 neighbours restricted";
pub const WORK: &str = "work of a guest";
pub const WORK_2K: &str = "work, 2,000 pages restricted";
pub const FAULTING: &str = "work with page faults";
pub const FAULTING_2K: &str = "work with page faults, 2,000 pages restricted";

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row::everywhere(FAULT, |bench| faults(bench, [])),
    Row::hooked(FAULT_1K, |bench| faults(bench, pages(SPARSE, 1000))),
    Row::hooked(FAULT_1M, |bench| faults(bench, pages(SPARSE, 1_000_000))),
    Row::hooked(FAULT_BESIDE, |bench| {
        let rest = pages(PLENTY, PLENTY_PAGES).skip(FAULTS as usize);
        faults(bench, rest)
    }),
    Row::everywhere(WORK, |bench| working(bench, [])),
    Row::hooked(WORK_2K, |bench| working(bench, others())),
    Row::everywhere(FAULTING, |bench| withdrawing(bench, WORKING, [])),
    Row::hooked(FAULTING_2K, |bench| withdrawing(bench, WORKING, others())),
];

/// Page faults per return to user space.
const FAULTS: u32 = 200;
/// Pieces of work, of which each fourth writes to another page.
pub const PIECES: u32 = 64;
/// Work of a guest.
pub const WORKING: Program = Program::WorkOut(PIECES, PLENTY);

/// Pages that a guest that works does not access, or, that with its code, does not write to.
fn others() -> impl Iterator<Item = u64> + Clone {
    pages(SPARSE, 2000).chain([CODE])
}

/// One page fault, while other pages are restricted.
fn faults(bench: &Bench<'_>, restricted: impl IntoIterator<Item = u64> + Clone) -> Result<Spread> {
    let touch = |count| withdrawing(bench, Program::TouchOut(count, PLENTY), restricted.clone());
    let (some, none) = (touch(FAULTS)?, touch(0)?);
    Ok(some.share(none, FAULTS))
}

/// Some work, with everything mapped.
fn working(bench: &Bench<'_>, restricted: impl IntoIterator<Item = u64>) -> Result<Spread> {
    let mut stage = Stage::new(WORKING, bench.setting, restricted)?;
    let bench = bench.fewer_rounds(10);
    bench.measure(|| exit::run(&mut stage.vcpu))
}

/// What a guest does between two returns to user space, with none of its data mapped at first.
fn withdrawing(
    bench: &Bench<'_>,
    program: Program,
    restricted: impl IntoIterator<Item = u64>,
) -> Result<Spread> {
    let mut stage = Stage::new(program, bench.setting, restricted)?;
    let plenty = stage.plenty;
    let withdraw = || {
        plenty.withdraw();
        Ok(())
    };
    let bench = bench.fewer_rounds(10);
    bench.measure_after(withdraw, || exit::run(&mut stage.vcpu))
}
