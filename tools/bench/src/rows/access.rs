// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What it costs to restrict pages, and to grant them again.

use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result};
use kvmi_client::abi::{
    access::{PageAccess, ALL, MAX_PAGES, W},
    wire::ReplyHead,
};

use super::{
    command::{ask, check},
    exit,
    message::Exchange,
    Bench, Row,
};
use crate::{
    figure::Spread,
    program::Program,
    stage::{pages, Stage, PLENTY, SPARSE},
};

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row::hooked("SET_PAGE_ACCESS, deny 1 page", |bench| deny(bench, 1)),
    Row::hooked("SET_PAGE_ACCESS, grant 1 page", |bench| grant(bench, 1)),
    Row::hooked("SET_PAGE_ACCESS, deny 511 pages", |bench| {
        deny(bench, MAX_PAGES)
    }),
    Row::hooked("SET_PAGE_ACCESS, grant 511 pages", |bench| {
        grant(bench, MAX_PAGES)
    }),
    Row::hooked("deny 1,000,000 pages, for each", |bench| {
        one_of_many(bench, DENIED, GRANTED)
    }),
    Row::hooked("grant 1,000,000 pages, for each", |bench| {
        one_of_many(bench, GRANTED, DENIED)
    }),
];

/// What the guest may do with restricted pages.
const DENIED: u8 = ALL & !W;
/// What it may do with others.
const GRANTED: u8 = ALL;
/// A large number of pages.
const MANY: u32 = 1_000_000;

/// As few commands as possible that say what the guest may do with pages.
fn commands(from: u64, count: usize, access: u8) -> Vec<Exchange> {
    let pages: Vec<PageAccess> = pages(from, count)
        .map(|gpa| PageAccess::new(gpa, access))
        .collect();
    let chunks = pages.chunks(MAX_PAGES);
    chunks.map(Exchange::set_page_access).collect()
}

/// Has them executed, one after the other.
fn execute(tool: &UnixStream, commands: &[Exchange]) -> Result<()> {
    let mut reply = [0; size_of::<ReplyHead>()];
    for command in commands {
        ask(tool, command, &mut reply)?;
        check(&reply)?;
    }
    Ok(())
}

fn tool(stage: &Stage) -> Result<UnixStream> {
    let hook = stage.hook.as_ref().context("the VM is not hooked")?;
    Ok(hook.tool.try_clone()?)
}

/// One command about pages that the guest has mapped.
fn deny(bench: &Bench<'_>, count: usize) -> Result<Spread> {
    let program = Program::TouchOut(u32::try_from(count)?, PLENTY);
    let mut stage = Stage::new(program, bench.setting, [])?;
    let tool = tool(&stage)?;
    let denied = commands(PLENTY, count, DENIED);
    let granted = commands(PLENTY, count, GRANTED);
    let grant_and_touch = || {
        execute(&tool, &granted)?;
        exit::run(&mut stage.vcpu)
    };
    let bench = bench.fewer_rounds(10);
    bench.measure_after(grant_and_touch, || execute(&tool, &denied))
}

/// One command about pages that have been restricted and not been accessed since.
fn grant(bench: &Bench<'_>, count: usize) -> Result<Spread> {
    let stage = Stage::new(Program::TouchOut(0, PLENTY), bench.setting, [])?;
    let tool = tool(&stage)?;
    let denied = commands(PLENTY, count, DENIED);
    let granted = commands(PLENTY, count, GRANTED);
    let bench = bench.fewer_rounds(10);
    bench.measure_after(|| execute(&tool, &denied), || execute(&tool, &granted))
}

/// One page of as many commands as it takes for all, about pages that nobody has touched.
fn one_of_many(bench: &Bench<'_>, access: u8, before: u8) -> Result<Spread> {
    let stage = Stage::new(Program::TouchOut(0, PLENTY), bench.setting, [])?;
    let tool = tool(&stage)?;
    let count = MANY as usize;
    let (commands, reverse) = (
        commands(SPARSE, count, access),
        commands(SPARSE, count, before),
    );
    let bench = bench.fewer_rounds(500);
    let all = bench.measure_after(|| execute(&tool, &reverse), || execute(&tool, &commands))?;
    Ok(all.share(Spread::of(&mut [0]), MANY))
}
