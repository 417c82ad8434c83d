// SPDX-License-Identifier: GPL-2.0

//! How long the host waits for a tool.

use kernel::{
    time::{
        msecs_to_jiffies,
        Instant,
        Jiffies,
        Monotonic,
        Msecs, //
    }, //
};

/// Returns what is left of `limit_ms`, counted from `since`.
pub(crate) fn time_left(limit_ms: Msecs, since: Instant<Monotonic>) -> Msecs {
    let gone = Msecs::try_from(since.elapsed().as_millis()).unwrap_or(Msecs::MAX);
    limit_ms.saturating_sub(gone)
}

/// Returns a time that is left, or none for ever, as those who sleep want it.
pub(crate) fn jiffies_left(left: Option<Msecs>) -> Jiffies {
    left.map_or(Jiffies::MAX, msecs_to_jiffies)
}

/// No limit.
pub(crate) fn for_ever() -> Jiffies {
    jiffies_left(None)
}
