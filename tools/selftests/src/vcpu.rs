// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A vCPU that runs when the test says so, on a thread of its own.

use std::{
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use kvm_bindings::{kvm_msr_entry, Msrs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use kvmi_abi::arch::{Regs, Sregs};
use vmm_sys_util::signal::{Killable, SIGRTMIN};
use zerocopy::FromBytes as _;

use crate::{
    guest::make_runnable,
    sys,
    util::{promptly, soon},
};

/// Why a `KVM_RUN` returned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Exit {
    /// The guest wrote to this port.
    Out(u16),
    /// It reads from this port, as often; at the next `KVM_RUN` it finds [`DEVICE`] in each byte.
    In(u16, usize),
    /// It reads memory of a device; at the next `KVM_RUN` it finds [`DEVICE`] in each byte.
    MmioRead(u64),
    /// It wrote to memory of a device, this in the first byte.
    MmioWrite(u64, u8),
    /// `KVM_EXIT_SHUTDOWN`
    Shutdown,
    /// A signal came.
    Interrupted,
    /// The vCPU waits to be started by another one.
    NotStarted,
}

/// What devices have in each byte.
pub const DEVICE: u8 = 0xd5;

type Order = Box<dyn FnOnce(&mut VcpuFd) + Send>;

/// A vCPU that runs when the test says so. It is stopped when this is dropped.
pub struct Vcpu {
    /// Its index, as in the protocol.
    pub index: u16,
    orders: Option<Sender<Order>>,
    exits: (Sender<Exit>, Receiver<Exit>),
    running: bool,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Takes over a vCPU, which does not run yet.
    pub fn new(mut fd: VcpuFd, index: u32) -> Self {
        tiny_vm::handle_signals();
        let (orders, todo) = mpsc::channel::<Order>();
        let thread = thread::spawn(move || {
            tiny_vm::avoid_cpu0();
            for order in todo {
                order(&mut fd);
            }
        });
        Self {
            index: index.try_into().expect("an index"),
            orders: Some(orders),
            exits: mpsc::channel(),
            running: false,
            thread: Some(thread),
        }
    }

    fn order(&self, order: Order) {
        let orders = self.orders.as_ref().expect("the thread is there");
        orders.send(order).expect("the thread is there");
    }

    /// Lets the thread go into `KVM_RUN`.
    #[track_caller]
    pub fn run(&mut self) {
        assert!(!self.running);
        self.running = true;
        let exits = self.exits.0.clone();
        self.order(Box::new(move |fd| {
            // The test may have lost interest.
            let _ = exits.send(enter(fd));
        }));
    }

    /// Lets the thread go into `KVM_RUN`, and again after each signal, until the guest ends it.
    #[track_caller]
    pub fn run_through(&mut self) {
        assert!(!self.running);
        self.running = true;
        let exits = self.exits.0.clone();
        self.order(Box::new(move |fd| {
            let exit = loop {
                match enter(fd) {
                    Exit::Interrupted => {}
                    exit => break exit,
                }
            };
            // The test may have lost interest.
            let _ = exits.send(exit);
        }));
    }

    /// Waits until `KVM_RUN` returns by itself.
    #[track_caller]
    pub fn exit(&mut self) -> Exit {
        assert!(self.running);
        let exit = self.exits.1.recv_timeout(soon());
        self.running = false;
        exit.expect("KVM_RUN returns")
    }

    /// Whether `KVM_RUN` has returned; then, [`Self::exit`] does not wait.
    #[track_caller]
    pub fn has_exited(&mut self) -> bool {
        assert!(self.running);
        match self.exits.1.try_recv() {
            Ok(exit) => {
                let sent = self.exits.0.send(exit);
                sent.expect("the receiver is there");
                true
            }
            Err(_) => false,
        }
    }

    /// Runs the vCPU until `KVM_RUN` returns by itself.
    #[track_caller]
    pub fn run_until_exit(&mut self) -> Exit {
        self.run();
        self.exit()
    }

    /// Fails the test if `KVM_RUN` has returned.
    #[track_caller]
    pub fn expect_running(&self) {
        assert!(self.running);
        if let Ok(exit) = self.exits.1.try_recv() {
            panic!("KVM_RUN has returned: {exit:?}");
        }
    }

    /// Sends its thread a signal, which is lost if the thread is not in `KVM_RUN`.
    pub fn signal(&self) {
        let thread = self.thread.as_ref().expect("the thread is there");
        thread.kill(SIGRTMIN()).expect("a signal can be sent");
    }

    /// Sends a signal to its thread, which is known to be in `KVM_RUN`, and waits for the effect.
    #[track_caller]
    pub fn interrupt(&mut self) {
        self.signal();
        let exit = promptly("leaving KVM_RUN upon a signal", || self.exit());
        assert_eq!(exit, Exit::Interrupted);
    }

    /// Makes its thread leave `KVM_RUN`, wherever it is.
    #[track_caller]
    pub fn stop(&mut self) {
        assert_eq!(self.end_run(), Exit::Interrupted);
    }

    /// Makes its thread leave `KVM_RUN` if it is there, which may return by itself as well.
    #[track_caller]
    pub fn end_run(&mut self) -> Exit {
        assert!(self.running);
        let deadline = Instant::now() + soon();
        loop {
            // One that comes just before KVM_RUN is lost, so one may not do.
            self.signal();
            match self.exits.1.recv_timeout(Duration::from_millis(2)) {
                Ok(exit) => {
                    self.running = false;
                    return exit;
                }
                Err(RecvTimeoutError::Timeout) => {
                    assert!(Instant::now() < deadline, "KVM_RUN ignores signals");
                }
                Err(RecvTimeoutError::Disconnected) => panic!("the thread has ended"),
            }
        }
    }

    /// Does something with the vCPU, which must not be in `KVM_RUN`, on its thread.
    #[track_caller]
    pub fn with<T: Send + 'static>(
        &mut self,
        action: impl FnOnce(&mut VcpuFd) -> T + Send + 'static,
    ) -> T {
        assert!(!self.running);
        let (sender, result) = mpsc::channel();
        self.order(Box::new(move |fd| {
            // The receiver waits for it.
            let _ = sender.send(action(fd));
        }));
        let result = result.recv_timeout(soon());
        result.expect("what does not run the guest does not take long")
    }

    /// `KVM_GET_REGS`
    #[track_caller]
    pub fn regs(&mut self) -> Regs {
        let regs = self.with(|fd| fd.get_regs()).expect("KVM_GET_REGS");
        // SAFETY: the structure consists of 64-bit numbers alone.
        let bytes = unsafe { sys::bytes_of(&regs) };
        Regs::read_from_bytes(bytes).expect("it is the same structure")
    }

    /// `KVM_SET_REGS` with what `change` makes of the registers.
    #[track_caller]
    pub fn change_regs(&mut self, change: impl FnOnce(&mut Regs)) {
        let mut regs = self.regs();
        change(&mut regs);
        let set = self.with(move |fd| fd.set_regs(&to_kvm(&regs)));
        set.expect("KVM_SET_REGS");
    }

    /// `KVM_GET_SREGS`
    #[track_caller]
    pub fn sregs(&mut self) -> Sregs {
        let sregs = self.with(|fd| fd.get_sregs()).expect("KVM_GET_SREGS");
        // SAFETY: the structure names all of its padding.
        let bytes = unsafe { sys::bytes_of(&sregs) };
        Sregs::read_from_bytes(bytes).expect("it is the same structure")
    }

    /// `KVM_GET_MSRS` of one
    #[track_caller]
    pub fn msr(&mut self, index: u32) -> u64 {
        let mut msrs = msr_list(&[(index, 0)]);
        let (read, msrs) = self.with(move |fd| (fd.get_msrs(&mut msrs), msrs));
        assert_eq!(read.expect("KVM_GET_MSRS"), 1, "MSR {index:#x}");
        msrs.as_slice()[0].data
    }

    /// `KVM_SET_MSRS`
    #[track_caller]
    pub fn set_msrs(&mut self, values: &[(u32, u64)]) {
        let msrs = msr_list(values);
        let set = self.with(move |fd| fd.set_msrs(&msrs));
        assert_eq!(set.expect("KVM_SET_MSRS"), values.len(), "{values:x?}");
    }

    /// Starts it as another vCPU would.
    #[track_caller]
    pub fn make_runnable(&mut self) {
        self.with(|fd| make_runnable(fd));
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if self.running {
            self.end_run();
        }
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has ended the process.
            let _ = thread.join();
        }
    }
}

fn msr_list(values: &[(u32, u64)]) -> Msrs {
    let entries: Vec<_> = values
        .iter()
        .map(|(index, data)| kvm_msr_entry {
            index: *index,
            data: *data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).expect("a list of MSRs")
}

fn to_kvm(regs: &Regs) -> kvm_bindings::kvm_regs {
    kvm_bindings::kvm_regs {
        rax: regs.rax,
        rbx: regs.rbx,
        rcx: regs.rcx,
        rdx: regs.rdx,
        rsi: regs.rsi,
        rdi: regs.rdi,
        rsp: regs.rsp,
        rbp: regs.rbp,
        r8: regs.r8,
        r9: regs.r9,
        r10: regs.r10,
        r11: regs.r11,
        r12: regs.r12,
        r13: regs.r13,
        r14: regs.r14,
        r15: regs.r15,
        rip: regs.rip,
        rflags: regs.rflags,
    }
}

/// One `KVM_RUN`.
fn enter(fd: &mut VcpuFd) -> Exit {
    match fd.run() {
        Ok(VcpuExit::IoOut(port, _)) => Exit::Out(port),
        Ok(VcpuExit::IoIn(port, data)) => {
            data.fill(DEVICE);
            Exit::In(port, data.len())
        }
        Ok(VcpuExit::MmioRead(gpa, data)) => {
            data.fill(DEVICE);
            Exit::MmioRead(gpa)
        }
        Ok(VcpuExit::MmioWrite(gpa, data)) => Exit::MmioWrite(gpa, data[0]),
        Ok(VcpuExit::Shutdown) => Exit::Shutdown,
        Ok(exit) => panic!("unexpected exit of the guest: {exit:?}"),
        Err(error) => match sys::Errno::from_raw_os_error(error.errno()) {
            sys::Errno::INTR => Exit::Interrupted,
            sys::Errno::AGAIN => Exit::NotStarted,
            error => panic!("KVM_RUN: {error}"),
        },
    }
}
