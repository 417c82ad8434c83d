// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Commands, from the first byte sent to the last one received.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use anyhow::{ensure, Result};
use kvmi_client::{
    abi::wire::{ErrorCode, Header},
    Connection,
};
use zerocopy::FromBytes as _;

use super::{message::Exchange, Bench, Row};
use crate::{
    figure::Spread,
    program::Program,
    scene::{Scene, TOOL_CPU, VCPU_CPU},
};

pub const GET_REGISTERS: &str = "GET_REGISTERS, vCPU running";
pub const READ_PAGE: &str = "READ_PHYSICAL, 4 KiB";

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row::hooked("GET_VERSION", |bench| {
        of_vm(bench, &Exchange::get_version())
    }),
    Row::hooked("GET_VERSION by kvmi-client", by_client),
    Row::hooked("READ_PHYSICAL, 8 B", |bench| {
        of_vm(bench, &Exchange::read_physical(8))
    }),
    Row::hooked(READ_PAGE, |bench| {
        of_vm(bench, &Exchange::read_physical(4096))
    }),
    Row::hooked("GET_REGISTERS, vCPU halted", |bench| {
        command(bench, &halted()?, &Exchange::get_registers())
    }),
    Row::hooked(GET_REGISTERS, |bench| {
        let scene = Scene::new(Program::Count, VCPU_CPU)?;
        command(bench, &scene, &Exchange::get_registers())
    }),
];

/// A vCPU that takes no time.
fn halted() -> Result<Scene> {
    Scene::new(Program::Halt, TOOL_CPU)
}

fn of_vm(bench: &Bench<'_>, exchange: &Exchange) -> Result<Spread> {
    command(bench, &halted()?, exchange)
}

fn command(bench: &Bench<'_>, scene: &Scene, exchange: &Exchange) -> Result<Spread> {
    let mut reply = vec![0; exchange.reply];
    let spread = bench.measure(|| ask(&scene.hook.tool, exchange, &mut reply))?;
    check(&reply)?;
    Ok(spread)
}

/// Sends a command and receives the reply.
pub fn ask(mut tool: &UnixStream, exchange: &Exchange, reply: &mut [u8]) -> Result<()> {
    tool.write_all(&exchange.request)?;
    tool.read_exact(reply)?;
    Ok(())
}

/// Fails unless this is the whole reply to a command that was executed.
pub fn check(reply: &[u8]) -> Result<()> {
    let (header, payload) = Header::ref_from_prefix(reply).map_err(|_| super::short())?;
    let (error, _) = ErrorCode::ref_from_prefix(payload).map_err(|_| super::short())?;
    let complete = usize::from(header.size) == payload.len();
    ensure!(complete && error.err == 0, "{header:?} {error:?}");
    Ok(())
}

fn by_client(bench: &Bench<'_>) -> Result<Spread> {
    let scene = halted()?;
    let mut connection = Connection::<&UnixStream>::new(&scene.hook.tool);
    bench.measure(|| {
        connection.get_version()?;
        Ok(())
    })
}
