// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Pauses: command and its reply, event and the reply to that, until the guest runs on.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, Result};
use kvmi_client::abi::{id::VCPU_EVENT, wire::Header, Action, Event};
use zerocopy::FromBytes as _;

use super::{
    message::{event_reply, Exchange, EVENT},
    Bench, Row,
};
use crate::{
    figure::Spread,
    program::Program,
    scene::{Scene, VCPU_CPU},
};

pub const PAUSE: &str = "pause, vCPU running";

/// The rows of this file.
pub const ROWS: &[Row] = &[Row::hooked(PAUSE, pause)];

fn pause(bench: &Bench<'_>) -> Result<Spread> {
    let scene = Scene::new(Program::Count, VCPU_CPU)?;
    let mut tool = &scene.hook.tool;
    let exchange = Exchange::pause();
    // The reply and the event, in whatever order.
    let mut both = vec![0; exchange.reply + EVENT];
    bench.measure(|| {
        tool.write_all(&exchange.request)?;
        tool.read_exact(&mut both)?;
        let count = scene.count();
        tool.write_all(&answer(&both, exchange.reply)?)?;
        scene.wait_until_counted_from(count)
    })
}

/// The reply to the event among these two messages, which lets the vCPU go on.
fn answer(both: &[u8], reply: usize) -> Result<Vec<u8>> {
    let is_event = |message: &[u8]| {
        let (header, _) = Header::ref_from_prefix(message).ok()?;
        Some(header.id == VCPU_EVENT)
    };
    let messages = [both, both.get(reply..).unwrap_or_default()];
    let event = messages.into_iter().find(|one| is_event(one) == Some(true));
    event_reply(event.context("no event")?, Event::Pause, Action::Continue)
}
