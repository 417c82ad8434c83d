// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A thread that runs a vCPU.

use std::{
    fs,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc, Arc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use kvm_ioctls::{VcpuExit, VcpuFd};
use libc::{c_void, siginfo_t};
use rustix::{
    io::Errno,
    thread::{gettid, sched_getaffinity, sched_setaffinity, CpuSet, Pid},
};
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

/// A thread that runs a vCPU until it is told to stop, by being dropped or by the guest.
pub struct Runner {
    // Empty once it is joined.
    thread: Option<JoinHandle<()>>,
    tid: Pid,
    stop: Arc<AtomicBool>,
}

impl Runner {
    /// Starts running a vCPU.
    #[track_caller]
    pub fn start(mut vcpu: VcpuFd) -> Self {
        handle_signals();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let (sender, tid) = mpsc::channel();
        let thread = thread::spawn(move || {
            avoid_cpu0();
            // The receiver waits for it.
            let _ = sender.send(gettid());
            run(&mut vcpu, &told);
        });
        Self {
            thread: Some(thread),
            tid: tid.recv().expect("the thread starts"),
            stop,
        }
    }

    /// The thread's id.
    pub fn tid(&self) -> Pid {
        self.tid
    }

    /// Whether the thread sleeps.
    pub fn is_asleep(&self) -> bool {
        let path = format!("/proc/self/task/{}/stat", self.tid);
        let stat = fs::read_to_string(path).unwrap_or_default();
        let state = stat.rsplit(')').next();
        state.is_some_and(|rest| rest.starts_with(" S"))
    }

    /// Sends the thread a signal that ends `KVM_RUN`, and does nothing else.
    pub fn signal(&self) {
        if let Some(thread) = &self.thread {
            thread.kill(SIGRTMIN()).expect("a signal can be sent");
        }
    }

    /// Whether the thread has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Asks the thread to stop, without waiting for it.
    pub fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.ask_to_stop();
        // A signal that comes just before KVM_RUN is lost, so one may not do.
        while !self.has_ended() {
            self.signal();
            thread::sleep(Duration::from_millis(1));
        }
        if let Some(thread) = self.thread.take() {
            // Its panic has been reported.
            let _ = thread.join();
        }
    }
}

/// Has the signal that ends `KVM_RUN` do nothing else.
pub fn handle_signals() {
    extern "C" fn ignore(_: i32, _: *mut siginfo_t, _: *mut c_void) {}
    register_signal_handler(SIGRTMIN(), ignore).expect("a signal can be handled");
}

/// Runs a vCPU until it is told to stop, from outside or by the guest.
fn run(vcpu: &mut VcpuFd, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => return,
            Ok(exit) => panic!("unexpected exit of the guest: {exit:?}"),
            Err(error) => match Errno::from_raw_os_error(error.errno()) {
                Errno::INTR | Errno::AGAIN => {}
                error => panic!("KVM_RUN: {error}"),
            },
        }
    }
}

/// Keeps the calling thread off CPU 0, if there is another one.
///
/// A race of an emulator makes guests that run there lose time.
pub fn avoid_cpu0() {
    let Ok(allowed) = sched_getaffinity(None) else {
        return;
    };
    let mut others = CpuSet::new();
    for cpu in (1..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
        others.set(cpu);
    }
    if others.count() > 0 {
        // Best effort: only that emulator needs it.
        let _ = sched_setaffinity(None, &others);
    }
}
