// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What nothing that does the same can be cheaper than.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    thread,
};

use anyhow::Result;
use kvmi_client::EventId;
use tiny_vm::PAGE;

use super::{
    message::{event_size, Exchange, EVENT, EVENT_REPLY},
    Bench, Row,
};
use crate::{
    figure::Spread,
    memory::Holder,
    scene::{pin, TOOL_CPU, VCPU_CPU},
};

pub const GET_REGISTERS: &str = "AF_UNIX, sizes of GET_REGISTERS, across CPUs";
pub const PAUSE: &str = "AF_UNIX, sizes of a pause, across CPUs";

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row::hooked("process_vm_readv, 8 B", |bench| readv(bench, 8)),
    Row::hooked("process_vm_readv, 4 KiB", |bench| readv(bench, PAGE)),
    Row::hooked("AF_UNIX, sizes of GET_VERSION", |bench| {
        ping_pong(bench, TOOL_CPU, &[sizes(&Exchange::get_version())])
    }),
    Row::hooked("AF_UNIX, sizes of READ_PHYSICAL, 8 B", |bench| {
        ping_pong(bench, TOOL_CPU, &[sizes(&Exchange::read_physical(8))])
    }),
    Row::hooked("AF_UNIX, sizes of READ_PHYSICAL, 4 KiB", |bench| {
        ping_pong(bench, TOOL_CPU, &[sizes(&Exchange::read_physical(4096))])
    }),
    Row::hooked("AF_UNIX, sizes of GET_REGISTERS", |bench| {
        ping_pong(bench, TOOL_CPU, &[sizes(&Exchange::get_registers())])
    }),
    Row::hooked(GET_REGISTERS, |bench| {
        ping_pong(bench, VCPU_CPU, &[sizes(&Exchange::get_registers())])
    }),
    Row::hooked("AF_UNIX, sizes of a pause", |bench| {
        ping_pong(bench, TOOL_CPU, &pause())
    }),
    Row::hooked(PAUSE, |bench| ping_pong(bench, VCPU_CPU, &pause())),
    Row::hooked("AF_UNIX, sizes of a PF event, across CPUs", |bench| {
        ping_pong(bench, VCPU_CPU, &[(EVENT_REPLY, event_size(EventId::Pf))])
    }),
];

/// The command and its reply, the event and the reply to that.
fn pause() -> [(usize, usize); 2] {
    [sizes(&Exchange::pause()), (EVENT_REPLY, EVENT)]
}

fn readv(bench: &Bench<'_>, size: usize) -> Result<Spread> {
    let holder = Holder::start()?;
    let mut buffer = vec![0; size];
    bench.measure(|| holder.read(&mut buffer))
}

fn sizes(exchange: &Exchange) -> (usize, usize) {
    (exchange.request.len(), exchange.reply)
}

/// Messages of these sizes, each to a thread on this CPU and back.
fn ping_pong(bench: &Bench<'_>, cpu: usize, sizes: &[(usize, usize)]) -> Result<Spread> {
    let (mut here, mut there) = UnixStream::pair()?;
    let largest = sizes.iter().map(|(to, from)| *to.max(from));
    let largest = largest.max().unwrap_or_default();
    thread::scope(|scope| {
        scope.spawn(move || -> Result<()> {
            pin(cpu)?;
            let mut buffer = vec![0; largest];
            for (to, from) in sizes.iter().cycle() {
                // It ends when the other side does.
                if there.read_exact(&mut buffer[..*to]).is_err()
                    || there.write_all(&buffer[..*from]).is_err()
                {
                    break;
                }
            }
            Ok(())
        });
        let mut buffer = vec![0; largest];
        let spread = bench.measure(|| {
            for (to, from) in sizes {
                here.write_all(&buffer[..*to])?;
                here.read_exact(&mut buffer[..*from])?;
            }
            Ok(())
        });
        drop(here);
        spread
    })
}
