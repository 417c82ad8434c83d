// SPDX-License-Identifier: GPL-2.0

//! What other threads tell a vCPU's thread.

use kernel::{
    prelude::*,
    time::{
        Instant,
        Monotonic, //
    }, //
};
use kvmi_abi::{
    vcpu_request::EventAnswer,
    wire::Header,
    Command,
    Event, //
};

/// Commands that a vCPU may have waiting. When there are as many, nothing more is read from the
/// tool.
pub(super) const MAX_JOBS: usize = 32;

/// A command of the tool.
pub(crate) struct Job {
    pub(crate) header: Header,
    pub(crate) command: Command,
    /// What follows the vCPU header.
    pub(crate) payload: KVec<u8>,
}

/// An event that was sent.
pub(super) struct Outstanding {
    pub(super) seq: u32,
    pub(super) event: Event,
    pub(super) answer: Option<EventAnswer>,
    /// How many of the waiting jobs came before the answer, and are to be executed before it.
    pub(super) jobs_before: usize,
    /// When it was sent: signals do not prolong the time that the tool has.
    pub(super) since: Instant<Monotonic>,
}

/// What other threads tell the vCPU's thread.
pub(super) struct Inbox {
    /// In the order of arrival; never grows beyond its capacity.
    pub(super) jobs: KVec<Job>,
    /// Pause events to be sent.
    pub(super) pauses: u32,
    pub(super) outstanding: Option<Outstanding>,
    /// There is no tool any more.
    pub(super) closed: bool,
    /// And the vCPU knows of that.
    pub(super) alone: bool,
    /// The time for replies has changed.
    pub(super) clock_changed: bool,
}

impl Inbox {
    /// Creates an empty one, with memory for all jobs that it may hold.
    pub(super) fn new(closed: bool) -> Result<Self> {
        Ok(Self {
            jobs: KVec::with_capacity(MAX_JOBS, GFP_KERNEL)?,
            pauses: 0,
            outstanding: None,
            closed,
            alone: false,
            clock_changed: false,
        })
    }

    /// Whether a vCPU that waits for the reply to an event has something to do.
    pub(super) fn wakes(&self) -> bool {
        self.closed || self.clock_changed || !self.jobs.is_empty() || self.is_answered()
    }

    /// Whether the tool has gone since this was asked last.
    pub(super) fn let_go(&mut self) -> bool {
        let news = self.closed && !self.alone;
        self.alone = self.closed;
        news
    }

    /// Whether the event is answered and the commands before the answer are executed.
    pub(super) fn is_answered(&self) -> bool {
        let answered = |o: &Outstanding| o.answer.is_some() && o.jobs_before == 0;
        self.outstanding.as_ref().is_some_and(answered)
    }
}
