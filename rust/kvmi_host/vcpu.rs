// SPDX-License-Identifier: GPL-2.0

//! A vCPU of a hooked VM: its commands, its pauses and its event.
//!
//! Other threads leave what they want in the inbox and request the vCPU's attention; its own
//! thread serves that, in [`Vcpu::work`], before it enters the guest. A vCPU that waits for the
//! reply to an event goes on serving commands.
//!
//! When a signal gets the thread out of `KVM_RUN`, whatever was under way (a wait, a reply or an
//! event not sent yet) is left as it is, and continued at the next `KVM_RUN`.

mod access;
mod event;
mod inbox;
mod work;

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
        Delta, //
    }, //
};
use kvmi_abi::{
    vcpu::MAX_PENDING_PAUSES,
    vcpu_request::EventAnswer,
    KvmiError, //
};

pub(crate) use self::inbox::Job;
use self::{
    inbox::{
        Inbox,
        MAX_JOBS, //
    },
    work::ThreadState, //
};
use crate::{
    connection::Connection,
    kvm::VcpuRemote,
    session::Session, //
};

/// After so many commands a vCPU is left alone for [`BREATHER`], so that a tool that floods it
/// cannot keep it out of the guest.
const JOBS_IN_A_ROW: u32 = 64;
const BREATHER: Delta = Delta::from_micros(200);
/// How often that long the vCPU may take to finish what it has.
const MAX_BREATHERS: u32 = 50;

/// How often the receive thread, when it waits for room, looks whether the tool is still there, in
/// milliseconds.
const HANGUP_CHECK_MS: u32 = 100;

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
    /// Bits of the events that are switched on; for the vCPU's thread.
    events: Atomic<u32>,
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
        let inbox = Inbox::new(session.connection().is_closed())?;
        let thread = ThreadState::new()?;
        Arc::pin_init(
            pin_init!(Self {
                index,
                session,
                remote,
                served: Atomic::new(false),
                jobs_in_a_row: Atomic::new(0),
                events: Atomic::new(0),
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

    /// Hands over a command; sleeps while there is no room. Fails with `EPIPE` if the tool hangs
    /// up meanwhile, `EINTR` if the thread is killed.
    pub(crate) fn enqueue(&self, job: Job) -> Result {
        self.pace();
        self.wait_for_room()?;
        // Room was allocated, and only this thread fills it; the job is given back otherwise.
        let refused = self.inbox.lock().jobs.push_within_capacity(job).err();
        if refused.is_some() {
            return Err(ENOMEM);
        }
        self.remote.request();
        Ok(())
    }

    /// Lets the vCPU into the guest every now and then: when it has nothing left to do, and for a
    /// while. A vCPU whose thread is in the VMM is not waited for.
    fn pace(&self) {
        let jobs = self.jobs_in_a_row.load(Relaxed) + 1;
        if jobs >= JOBS_IN_A_ROW {
            for _ in 0..MAX_BREATHERS {
                if self.inbox.lock().jobs.is_empty() {
                    break;
                }
                fsleep(BREATHER);
            }
            fsleep(BREATHER);
        }
        self.jobs_in_a_row.store(jobs % JOBS_IN_A_ROW, Relaxed);
    }

    /// Waits until there is room for a job, or no tool any more. Fails with `EPIPE` if the tool hangs
    /// up meanwhile, `EINTR` if the thread is killed.
    fn wait_for_room(&self) -> Result {
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
        Ok(())
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
        let jobs_before = inbox.jobs.len();
        let waiting = inbox.outstanding.as_mut();
        let Some(outstanding) =
            waiting.filter(|o| o.seq == seq && o.event == answer.event && o.answer.is_none())
        else {
            return false;
        };
        outstanding.answer = Some(*answer);
        outstanding.jobs_before = jobs_before;
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

    /// Has a wait for the reply to an event take notice of a new limit.
    pub(crate) fn look_at_the_clock(&self) {
        self.inbox.lock().clock_changed = true;
        self.remote.request();
    }
}
