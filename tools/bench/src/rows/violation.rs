// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Accesses that the guest is denied.

use anyhow::Result;
use kvmi_client::{Access, Action, EventId};

use super::{event::round_trip, exit, Bench, Row};
use crate::{
    figure::Spread,
    program::{Program, TARGET},
    scene::{Scene, VCPU_CPU},
    stage::Stage,
};

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row::hooked("denied write, no event", step),
    Row::hooked("denied write, PF event, CONTINUE", |bench| {
        event(bench, Action::Continue)
    }),
    Row::hooked("denied write, PF event, RETRY", |bench| {
        event(bench, Action::Retry)
    }),
];

/// Steps over an instruction per return to user space.
const STEPS: u32 = 100;

/// One write to a page that may not be written to, which nobody wants to be asked about.
fn step(bench: &Bench<'_>) -> Result<Spread> {
    let write = |count| {
        let mut stage = Stage::new(Program::WriteOut(count), bench.setting, [TARGET])?;
        bench.measure(|| exit::run(&mut stage.vcpu))
    };
    let (some, none) = (write(STEPS)?, write(0)?);
    Ok(some.share(none, STEPS))
}

/// From the reply to a PF event until the next one has been received. The guest does nothing in
/// between, but for a few instructions once the write is permitted.
fn event(bench: &Bench<'_>, action: Action) -> Result<Spread> {
    let scene = Scene::new(Program::WriteCount, VCPU_CPU)?;
    let mut client = scene.hook.client();
    client.vcpu_control_events(0, EventId::Pf, true)?;
    client.set_page_access([(TARGET, Access::R | Access::X)])?;
    round_trip(bench, client, &scene.hook.tool, EventId::Pf, action)
}
