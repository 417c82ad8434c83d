// SPDX-License-Identifier: GPL-2.0

//! A vCPU of a hooked VM: its commands, its pauses and its event.
//!
//! Other threads leave what they want in the inbox and request the vCPU's attention; its own
//! thread serves that, in [`Vcpu::work`], before it enters the guest. A vCPU that waits for the
//! reply to an event goes on serving commands.
//!
//! When a signal gets the thread out of `KVM_RUN`, whatever was under way (a wait, a reply or an
//! event not sent yet) is left as it is, and continued at the next `KVM_RUN`.

use kernel::{
    new_condvar,
    new_mutex,
    new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        CondVar,
        CondVarTimeoutResult,
        Mutex,
        SpinLock, //
    },
    time::{
        delay::fsleep,
        msecs_to_jiffies,
        Delta,
        Instant,
        Monotonic, //
    }, //
};
use kvmi_abi::{
    arch::Regs,
    vcpu::{
        TrapEvent,
        MAX_PENDING_PAUSES, //
    },
    vcpu_request::{
        Action,
        EventAnswer, //
    },
    wire::{
        Header,
        MAX_MSG_SIZE, //
    },
    Command,
    Event,
    KvmiError,
    VcpuRequest, //
};
use zerocopy::IntoBytes;

use crate::{
    connection::Connection,
    kvm::{
        CurrentVcpu,
        VcpuRemote,
        Woken, //
        WorkDone,
    },
    session::Session,
    vcpu_command, //
};

/// Commands that a vCPU may have waiting. When there are as many, nothing more is read from the
/// tool.
const MAX_JOBS: usize = 32;

/// After so many commands a vCPU is left alone for [`BREATHER`], so that a tool that floods it
/// cannot keep it out of the guest.
const JOBS_IN_A_ROW: u32 = 64;
const BREATHER: Delta = Delta::from_micros(200);

/// How often the receive thread, when it waits for room, looks whether the tool is still there, in
/// milliseconds.
const HANGUP_CHECK_MS: u32 = 100;

/// A command of the tool.
pub(crate) struct Job {
    pub(crate) header: Header,
    pub(crate) command: Command,
    /// What follows the vCPU header.
    pub(crate) payload: KVec<u8>,
}

/// An event that was sent.
struct Outstanding {
    seq: u32,
    event: Event,
    answer: Option<Action>,
    /// When it was sent: signals do not prolong the time that the tool has.
    since: Instant<Monotonic>,
}

/// What other threads tell the vCPU's thread.
struct Inbox {
    /// In the order of arrival; never grows beyond its capacity.
    jobs: KVec<Job>,
    /// Pause events to be sent.
    pauses: u32,
    outstanding: Option<Outstanding>,
    /// There is no tool any more.
    closed: bool,
}

impl Inbox {
    /// Whether a vCPU that waits for the reply to an event has something to do.
    fn wakes(&self) -> bool {
        let answered = |o: &Outstanding| o.answer.is_some();
        self.closed || !self.jobs.is_empty() || self.outstanding.as_ref().is_some_and(answered)
    }
}

/// What only the vCPU's thread uses.
struct ThreadState {
    /// Where the data of replies and the bodies of events are put together.
    scratch: KVec<u8>,
    /// A reply that could not be sent because of a signal; its data is the begin of `scratch`.
    unsent: Option<(Header, Result<usize, KvmiError>)>,
    /// A trap that was not sent yet.
    trap: Option<TrapEvent>,
    /// What SET_REGISTERS has left for the end of the event.
    new_regs: Option<Regs>,
}

/// A vCPU of a hooked VM.
#[pin_data]
pub(crate) struct Vcpu {
    index: u16,
    session: Arc<Session>,
    remote: Arc<VcpuRemote>,
    /// It has served a request, so its thread is in `KVM_RUN` or has been.
    served: Atomic<bool>,
    /// Commands since the last breather; for the receive thread.
    jobs_in_a_row: Atomic<u32>,
    #[pin]
    inbox: SpinLock<Inbox>,
    /// Notified when there is room for a job.
    #[pin]
    room: CondVar,
    #[pin]
    thread: Mutex<ThreadState>,
}

impl Vcpu {
    /// Creates the state of vCPU number `index`.
    pub(crate) fn new(
        index: u16,
        session: Arc<Session>,
        remote: Arc<VcpuRemote>,
    ) -> Result<Arc<Self>> {
        let inbox = Inbox {
            jobs: KVec::with_capacity(MAX_JOBS, GFP_KERNEL)?,
            pauses: 0,
            outstanding: None,
            closed: session.connection().is_closed(),
        };
        let thread = ThreadState {
            scratch: KVec::from_elem(0, MAX_MSG_SIZE, GFP_KERNEL)?,
            unsent: None,
            trap: None,
            new_regs: None,
        };
        Arc::pin_init(
            pin_init!(Self {
                index,
                session,
                remote,
                served: Atomic::new(false),
                jobs_in_a_row: Atomic::new(0),
                inbox <- new_spinlock!(inbox, "Vcpu::inbox"),
                room <- new_condvar!("Vcpu::room"),
                thread <- new_mutex!(thread, "Vcpu::thread"),
            }),
            GFP_KERNEL,
        )
    }

    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    fn connection(&self) -> &Connection {
        self.session.connection()
    }

    /// Whether the vCPU can be given commands.
    pub(crate) fn is_usable(&self) -> bool {
        self.remote.is_initialized() || self.is_in_event()
    }

    /// Whether the vCPU waits for the reply to an event.
    pub(crate) fn is_in_event(&self) -> bool {
        self.inbox.lock().outstanding.is_some()
    }

    // --- For the receive thread --------------------------------------------------------------

    /// Hands over a command; sleeps while there is no room. Fails with `EPIPE` if the tool hangs
    /// up meanwhile, `EINTR` if the thread is killed.
    pub(crate) fn enqueue(&self, job: Job) -> Result {
        self.pace();
        let mut inbox = self.inbox.lock();
        let mut check = msecs_to_jiffies(HANGUP_CHECK_MS);
        while !inbox.closed && inbox.jobs.len() >= MAX_JOBS {
            match self.room.wait_interruptible_timeout(&mut inbox, check) {
                CondVarTimeoutResult::Woken { jiffies } => check = jiffies,
                CondVarTimeoutResult::Signal { .. } => return Err(EINTR),
                CondVarTimeoutResult::Timeout => {
                    check = msecs_to_jiffies(HANGUP_CHECK_MS);
                    drop(inbox);
                    if self.connection().peer_has_hung_up() {
                        return Err(EPIPE);
                    }
                    inbox = self.inbox.lock();
                }
            }
        }
        // There is room, and room was allocated; the job is given back otherwise.
        let refused = inbox.jobs.push_within_capacity(job).err();
        drop(inbox);
        if refused.is_some() {
            return Err(ENOMEM);
        }
        self.remote.request();
        Ok(())
    }

    /// Lets the vCPU into the guest every now and then.
    fn pace(&self) {
        let jobs = self.jobs_in_a_row.load(Relaxed) + 1;
        if jobs >= JOBS_IN_A_ROW {
            fsleep(BREATHER);
        }
        self.jobs_in_a_row.store(jobs % JOBS_IN_A_ROW, Relaxed);
    }

    /// Asks for a PAUSE event; if `wait`, returns when the vCPU is out of the guest.
    pub(crate) fn pause(&self, wait: bool) -> Result<(), KvmiError> {
        let mut inbox = self.inbox.lock();
        if inbox.pauses >= MAX_PENDING_PAUSES {
            return Err(KvmiError::Busy);
        }
        inbox.pauses += 1;
        drop(inbox);
        if wait {
            self.remote.request_sync();
        } else {
            self.remote.request();
        }
        Ok(())
    }

    /// Takes the reply to an event; gives `false` if it is not one that the vCPU waits for.
    pub(crate) fn answer(&self, seq: u32, answer: &EventAnswer) -> bool {
        let mut inbox = self.inbox.lock();
        let waiting = inbox.outstanding.as_mut();
        let Some(outstanding) =
            waiting.filter(|o| o.seq == seq && o.event == answer.event && o.answer.is_none())
        else {
            return false;
        };
        outstanding.answer = Some(answer.action);
        drop(inbox);
        self.remote.request();
        true
    }

    /// Lets go of the vCPU: there is no tool any more. Needs no memory.
    pub(crate) fn release(&self) {
        let mut inbox = self.inbox.lock();
        inbox.closed = true;
        inbox.pauses = 0;
        drop(inbox);
        self.room.notify_all();
        self.remote.request();
    }

    // --- For the vCPU's thread ---------------------------------------------------------------

    /// Serves what there is: the event under way, then a trap, then commands, then pauses.
    pub(crate) fn work(&self, current: &CurrentVcpu) -> Result<WorkDone> {
        if !self.served.xchg(true, Relaxed) {
            self.session.counters().vcpus_served.fetch_add(1, Relaxed);
        }
        let mut thread = self.thread.lock();
        let thread = &mut *thread;
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
            if thread.trap.is_none() {
                thread.trap = current.trap();
            }
            if let Some(trap) = thread.trap {
                self.raise(thread, current, Event::Trap, trap.as_bytes())?;
                thread.trap = None;
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

    /// Sends the reply that is waiting, if any. Fails only because of a signal; a reply to nobody
    /// is dropped.
    fn send_unsent(&self, thread: &mut ThreadState, current: &CurrentVcpu) -> Result {
        let Some((header, result)) = thread.unsent else {
            return Ok(());
        };
        let data = match result {
            Ok(len) => Ok(thread.scratch.get(..len).unwrap_or_default()),
            Err(error) => Err(error),
        };
        let sent = current.unlocked(|| self.connection().reply(&header, data))?;
        if sent == Err(EINTR) {
            return Err(EINTR);
        }
        thread.unsent = None;
        Ok(())
    }

    /// Sends an event, unless there is nobody to send it to. Fails only because of a signal.
    fn raise(
        &self,
        thread: &mut ThreadState,
        current: &CurrentVcpu,
        event: Event,
        specific: &[u8],
    ) -> Result {
        if self.connection().is_closed() || !self.session.policy().allows_event(event) {
            return Ok(());
        }
        let len = vcpu_command::put_event(self, current, event, specific, &mut thread.scratch);
        let Some(body) = thread.scratch.get(..len) else {
            return Ok(());
        };
        // The reply may be there before the sending of the event returns.
        let expect = |seq| {
            self.inbox.lock().outstanding = Some(Outstanding {
                seq,
                event,
                answer: None,
                since: Instant::now(),
            });
        };
        let sent = current.unlocked(|| self.connection().send_vcpu_event(body, expect))?;
        match sent {
            Ok(()) => {
                self.session.counters().events.fetch_add(1, Relaxed);
                Ok(())
            }
            Err(e) => {
                self.inbox.lock().outstanding = None;
                if e == EINTR {
                    Err(e)
                } else {
                    Ok(())
                }
            }
        }
    }

    /// Returns how long to wait for the reply to the event under way; 0 means for ever.
    fn time_left_ns(&self) -> u64 {
        let limit = self.session.event_timeout_ns();
        let inbox = self.inbox.lock();
        let gone = inbox.outstanding.as_ref().map(|o| o.since.elapsed());
        let gone = gone.map_or(0, |gone| u64::try_from(gone.as_nanos()).unwrap_or_default());
        match limit {
            0 => 0,
            limit => limit.saturating_sub(gone).max(1),
        }
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
        let mut timeout_ns = self.time_left_ns();
        loop {
            match current.wait(|| self.inbox.lock().wakes(), timeout_ns)? {
                Woken::Done => {}
                Woken::Timeout => {
                    // The receive thread notices, and lets go of all vCPUs.
                    self.connection().close();
                    timeout_ns = 0;
                    continue;
                }
                Woken::Detaching => {
                    self.inbox.lock().outstanding = None;
                    thread.new_regs = None;
                    return Ok(WorkDone::Enter);
                }
            }
            if let Some(job) = self.take_job() {
                self.run(thread, current, &job)?;
                continue;
            }
            let mut inbox = self.inbox.lock();
            let closed = inbox.closed;
            let answer = inbox.outstanding.as_ref().and_then(|o| o.answer);
            if closed || answer.is_some() {
                inbox.outstanding = None;
            }
            drop(inbox);
            if closed {
                thread.new_regs = None;
                return Ok(WorkDone::Enter);
            }
            match answer {
                Some(Action::Crash) => {
                    thread.new_regs = None;
                    current.crash();
                    return Ok(WorkDone::Leave);
                }
                Some(Action::Continue | Action::Retry) => {
                    if let Some(regs) = thread.new_regs.take() {
                        current.set_regs(&regs);
                    }
                    return Ok(WorkDone::Enter);
                }
                None => {}
            }
        }
    }
}
