// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Events of a guest that does nothing but what makes them.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use anyhow::{bail, ensure, Result};
use kvmi_client::{
    abi::{id::VCPU_EVENT, wire::Header},
    Action, Event, EventId,
};
use zerocopy::FromBytes as _;

use super::{
    message::{event_reply, event_size},
    Bench,
};
use crate::{figure::Spread, scene::Client};

/// Waits for the first event and replies to it. The client has not received anything else then,
/// and is not needed any more.
pub fn answer_first(mut client: Client<'_>, action: Action) -> Result<()> {
    let Event::Vcpu(first) = client.next_event(None)? else {
        bail!("an event that is not of a vCPU");
    };
    Ok(client.reply_event(&first, action)?)
}

/// From the reply to an event until the next one has been received. `client` has switched it on.
pub fn round_trip(
    bench: &Bench<'_>,
    client: Client<'_>,
    mut tool: &UnixStream,
    event: EventId,
    action: Action,
) -> Result<Spread> {
    answer_first(client, action)?;
    let mut message = vec![0; event_size(event)];
    tool.read_exact(&mut message)?;
    let spread = bench.measure(|| {
        tool.write_all(&event_reply(&message, event, action)?)?;
        tool.read_exact(&mut message)?;
        Ok(())
    })?;
    let (header, payload) = Header::ref_from_prefix(&message).map_err(|_| super::short())?;
    let complete = usize::from(header.size) == payload.len();
    ensure!(header.id == VCPU_EVENT && complete, "{header:?}");
    Ok(spread)
}
