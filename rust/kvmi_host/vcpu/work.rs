// SPDX-License-Identifier: GPL-2.0

//! What a vCPU's own thread does for the tool.

use kernel::{
    current,
    prelude::*,
    sync::atomic::Relaxed,
    time::{
        Instant,
        Monotonic,
        Msecs, //
    }, //
};
use kvmi_abi::{
    arch::Regs,
    guest_event::SinglestepEvent,
    vcpu::TrapEvent,
    vcpu_request::{
        Action,
        EventAnswer, //
    },
    wire::{
        Header,
        MAX_MSG_SIZE, //
    },
    Event,
    KvmiError,
    VcpuRequest, //
};
use zerocopy::IntoBytes;

use super::{
    event::CallLimit,
    inbox::{
        Job,
        Outstanding, //
    },
    Vcpu, //
};
use crate::{
    clock::jiffies_left,
    connection::Left,
    kvm::{
        CurrentVcpu,
        GuestEvent,
        Violation,
        Woken,
        WorkDone, //
    },
    vcpu_command, //
};

/// What only the vCPU's thread uses.
pub(super) struct ThreadState {
    /// Where the data of replies and the bodies of events are put together.
    scratch: KVec<u8>,
    /// A reply that could not be sent because of a signal; its data is the begin of `scratch`.
    unsent: Option<(Header, Result<usize, KvmiError>)>,
    /// Since when something is to be sent that could not be sent so far.
    sending_since: Option<Instant<Monotonic>>,
    /// A trap that was not sent yet.
    trap: Option<TrapEvent>,
    /// An instruction that nobody was told of yet.
    step: Option<SinglestepEvent>,
    /// An access that the guest is denied, and nothing was decided about yet.
    pub(super) violation: Option<Violation>,
    /// Something else that the guest is about to do, and nothing was decided about yet.
    pub(super) guest_event: Option<GuestEvent>,
    /// Calls of the guest to its tool.
    pub(super) calls: CallLimit,
    /// What SET_REGISTERS has left for the end of the event.
    new_regs: Option<Regs>,
}

impl ThreadState {
    /// Creates one of a vCPU that has done nothing yet.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            scratch: KVec::from_elem(0, MAX_MSG_SIZE, GFP_KERNEL)?,
            unsent: None,
            sending_since: None,
            trap: None,
            step: None,
            violation: None,
            guest_event: None,
            calls: CallLimit::new(),
            new_regs: None,
        })
    }
}

impl Vcpu {
    /// Serves what there is: the event under way, then a trap, then an instruction that is over, then
    /// what the guest is about to do, then commands, then pauses.
    pub(crate) fn work(&self, current: &CurrentVcpu) -> Result<WorkDone> {
        if !self.served.xchg(true, Relaxed) {
            self.session.counters().vcpus_served.fetch_add(1, Relaxed);
        }
        let mut thread = self.thread.lock();
        let thread = &mut *thread;
        if self.connection().is_unfinished() {
            let since = &mut thread.sending_since;
            self.transmit(since, current, |left| self.connection().finish(left))?;
        }
        self.send_unsent(thread, current)?;
        loop {
            if self.is_in_event() {
                if self.finish_event(thread, current)? == WorkDone::Leave {
                    // What is left is for the next `KVM_RUN`, if there is one.
                    self.remote.request();
                    return Ok(WorkDone::Leave);
                }
                continue;
            }
            if self.inbox.lock().let_go() {
                current.track_nothing();
            }
            if current.was_refused() {
                // As if the reply was malformed.
                self.connection().close();
            }
            if thread.trap.is_none() {
                thread.trap = current.trap();
            }
            if thread.step.is_none() {
                thread.step = current.step();
            }
            if thread.violation.is_none() {
                thread.violation = current.violation();
            }
            if let Some(trap) = thread.trap {
                self.raise(thread, current, Event::Trap, trap.as_bytes())?;
                thread.trap = None;
            } else if let Some(step) = thread.step {
                self.raise(thread, current, Event::Singlestep, step.as_bytes())?;
                thread.step = None;
            } else if let Some(event) = thread.guest_event.or_else(|| current.guest_event()) {
                thread.guest_event = Some(event);
                self.report(thread, current, &event)?;
            } else if let Some(violation) = thread.violation {
                self.report_violation(thread, current, &violation)?;
            } else if current!().signal_pending() {
                // However much there is to do: the VMM wants its thread back.
                return Err(EINTR);
            } else if let Some(job) = self.take_job() {
                self.run(thread, current, &job)?;
            } else if self.take_pause() {
                // The tool may ask for another one as soon as it has the event.
                self.raise(thread, current, Event::Pause, &[])
                    .inspect_err(|_| self.inbox.lock().pauses += 1)?;
            } else {
                return Ok(WorkDone::Enter);
            }
        }
    }

    fn take_job(&self) -> Option<Job> {
        let mut inbox = self.inbox.lock();
        if inbox.closed || inbox.jobs.is_empty() {
            return None;
        }
        let job = inbox.jobs.remove(0).ok();
        if let Some(outstanding) = &mut inbox.outstanding {
            outstanding.jobs_before = outstanding.jobs_before.saturating_sub(1);
        }
        drop(inbox);
        self.room.notify_one();
        job
    }

    /// Takes a pause out of the count, if there is one.
    fn take_pause(&self) -> bool {
        let mut inbox = self.inbox.lock();
        let pending = inbox.pauses > 0;
        inbox.pauses = inbox.pauses.saturating_sub(1);
        pending
    }

    /// Executes a command and sends the reply.
    fn run(&self, thread: &mut ThreadState, current: &CurrentVcpu, job: &Job) -> Result {
        let policy = self.session.policy();
        let result = VcpuRequest::parse(job.command, &job.payload, &policy).and_then(|request| {
            vcpu_command::execute(
                self,
                current,
                request,
                &mut thread.scratch,
                &mut thread.new_regs,
            )
        });
        thread.unsent = Some((job.header, result));
        self.send_unsent(thread, current)
    }

    /// Sends the reply that is waiting, if any. Fails only because of a signal.
    fn send_unsent(&self, thread: &mut ThreadState, current: &CurrentVcpu) -> Result {
        let Some((header, result)) = thread.unsent else {
            return Ok(());
        };
        let data = match result {
            Ok(len) => Ok(thread.scratch.get(..len).unwrap_or_default()),
            Err(error) => Err(error),
        };
        let reply = |left: Left<'_>| self.connection().reply(&header, data, left);
        // A reply to nobody is dropped.
        let _sent = self.transmit(&mut thread.sending_since, current, reply)?;
        thread.unsent = None;
        Ok(())
    }

    /// Lets `send` send something for as long as the tool has time to make room for it. Fails with
    /// `EINTR` because of a signal; the time goes on then. Gives `false` if the connection is over.
    fn transmit(
        &self,
        since: &mut Option<Instant<Monotonic>>,
        current: &CurrentVcpu,
        send: impl FnOnce(Left<'_>) -> Result,
    ) -> Result<bool> {
        let begin = *since.get_or_insert_with(Instant::now);
        let left = || jiffies_left(self.session.time_left(begin));
        let sent = current.unlocked(|| send(&left))?;
        if sent == Err(EINTR) {
            return Err(EINTR);
        }
        *since = None;
        Ok(sent.is_ok())
    }

    /// Sends an event, unless there is nobody to send it to; gives whether it was sent. Fails only
    /// because of a signal.
    pub(super) fn raise(
        &self,
        thread: &mut ThreadState,
        current: &CurrentVcpu,
        event: Event,
        specific: &[u8],
    ) -> Result<bool> {
        if self.connection().is_closed() || !self.session.policy().allows_event(event) {
            thread.sending_since = None;
            return Ok(false);
        }
        let len = vcpu_command::put_event(self, current, event, specific, &mut thread.scratch);
        let Some(body) = thread.scratch.get(..len) else {
            return Ok(false);
        };
        // The reply may be there before the sending of the event returns.
        let expect = |seq| {
            self.inbox.lock().outstanding = Some(Outstanding {
                seq,
                event,
                answer: None,
                jobs_before: 0,
                since: Instant::now(),
            });
        };
        let send = |left: Left<'_>| {
            let connection = self.connection();
            connection.send_vcpu_event(self.index(), event, body, left, expect)
        };
        let sent = self.transmit(&mut thread.sending_since, current, send);
        let mut inbox = self.inbox.lock();
        if sent == Ok(true) {
            // The tool has all of its time from now on.
            if let Some(outstanding) = &mut inbox.outstanding {
                outstanding.since = Instant::now();
            }
            self.session.counters().events.fetch_add(1, Relaxed);
        } else {
            inbox.outstanding = None;
        }
        sent
    }

    /// Returns how many ms to wait for the reply to the event under way; `None` means for ever.
    fn time_left(&self) -> Option<Msecs> {
        let inbox = self.inbox.lock();
        let waiting = inbox.outstanding.as_ref().filter(|o| o.answer.is_none())?;
        self.session.time_left(waiting.since)
    }

    /// Finishes the event under way, and counts the time that takes.
    fn finish_event(&self, thread: &mut ThreadState, current: &CurrentVcpu) -> Result<WorkDone> {
        let begin = Instant::<Monotonic>::now();
        let done = self.wait_for_answer(thread, current);
        let held = u64::try_from(begin.elapsed().as_nanos()).unwrap_or_default();
        self.session.counters().held_ns.fetch_add(held, Relaxed);
        done
    }

    /// Waits for the reply to the event under way, serving commands meanwhile, and does what it
    /// says. Without a tool the guest goes on.
    fn wait_for_answer(&self, thread: &mut ThreadState, current: &CurrentVcpu) -> Result<WorkDone> {
        let mut over = false;
        loop {
            // Each time: commands do not prolong it, and the limit may have changed.
            let left = self.time_left().filter(|_| !over);
            if left == Some(0) {
                // The receive thread notices, and lets go of all vCPUs.
                self.connection().close();
                over = true;
                continue;
            }
            let timeout_ns = left.map_or(0, |ms| u64::from(ms) * 1_000_000);
            match current.wait(|| self.inbox.lock().wakes(), timeout_ns)? {
                Woken::Done => {}
                Woken::Timeout => continue,
                Woken::Detaching => {
                    self.inbox.lock().outstanding = None;
                    thread.new_regs = None;
                    thread.violation = None;
                    thread.guest_event = None;
                    return Ok(WorkDone::Enter);
                }
            }
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let answered = self.inbox.lock().is_answered();
            if !answered {
                if let Some(job) = self.take_job() {
                    self.run(thread, current, &job)?;
                    continue;
                }
            }
            let mut inbox = self.inbox.lock();
            inbox.clock_changed = false;
            let closed = inbox.closed;
            let event = inbox.outstanding.as_ref().map(|o| o.event);
            let answer = inbox.outstanding.as_ref().and_then(|o| o.answer);
            if closed || answer.is_some() {
                inbox.outstanding = None;
            }
            drop(inbox);
            if closed {
                thread.new_regs = None;
                return Ok(self.resolve(thread, current, event, None));
            }
            if answer.is_some() {
                return Ok(self.resolve(thread, current, event, answer));
            }
        }
    }

    /// Does what the tool has decided about an event, or, without an answer, lets the guest go on.
    fn resolve(
        &self,
        thread: &mut ThreadState,
        current: &CurrentVcpu,
        event: Option<Event>,
        answer: Option<EventAnswer>,
    ) -> WorkDone {
        let action = answer.map_or(Action::Continue, |answer| answer.action);
        let regs = thread.new_regs.take();
        let violation = thread.violation.take_if(|_| event == Some(Event::Pf));
        let guest_event = thread.guest_event.take_if(|e| event == Some(e.event()));
        if action == Action::Crash {
            current.crash();
            return WorkDone::Leave;
        }
        if let Some(regs) = regs {
            current.set_regs(&regs);
        }
        if action == Action::Continue {
            if let Some(violation) = violation {
                current.permit(&violation);
            }
            if let Some(event) = guest_event {
                let answered = |answer: EventAnswer| event.answered(answer.new_value);
                current.decide(&answer.map_or(event, answered));
            }
        }
        WorkDone::Enter
    }
}
