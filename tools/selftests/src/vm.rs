// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tiny VMs: a few MiB of memory, and vCPUs that count, halt or do nothing.

use std::{
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd},
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use libc::{c_void, siginfo_t};
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

use crate::{
    guest::{self, Record},
    memory::Memory,
    sys,
    tool::Tool,
    util::{soon, wait_for},
    vcpu::Vcpu,
};

pub use crate::guest::{Guest, STOP};

/// Size of a page.
pub const PAGE: usize = 4096;
/// Memory of a VM, from guest physical address 0 on.
pub const MEMORY: usize = 2 << 20;
/// Guest physical address of memory that no guest code uses, up to [`MEMORY`].
pub const SCRATCH: u64 = 0x1_0000;
struct VcpuThread {
    thread: JoinHandle<()>,
    tid: i32,
    index: u32,
    guest: Guest,
}

/// A VM of the test's own, that stops when it is dropped.
pub struct TestVm {
    fd: VmFd,
    /// Its memory at guest physical address 0.
    pub memory: Memory,
    stop: Arc<AtomicBool>,
    threads: Vec<VcpuThread>,
    irqchip: bool,
    vcpus: u32,
}

impl TestVm {
    /// A VM without memory or anything else.
    pub fn bare() -> Result<Self, kvm_ioctls::Error> {
        Ok(Self {
            fd: Kvm::new()?.create_vm()?,
            memory: Memory::new(0x4000),
            stop: Arc::default(),
            threads: Vec::new(),
            irqchip: false,
            vcpus: 0,
        })
    }

    /// A VM with memory and without vCPUs.
    pub fn new() -> Self {
        Self::with_memory(Memory::new(MEMORY), 0)
    }

    /// A VM with a dirty log of its memory.
    pub fn logging() -> Self {
        Self::with_memory(Memory::new(MEMORY), KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// A VM with [`MEMORY`] bytes of this memory, as slot 0.
    pub fn with_memory(memory: Memory, flags: u32) -> Self {
        guest::install(&memory);
        let mut vm = Self::bare().expect("a VM can be created");
        vm.memory = memory;
        vm.set_slot(0, 0, &memory, MEMORY, flags);
        vm
    }

    /// Adds an interrupt controller, before the first vCPU.
    pub fn with_irqchip(mut self) -> Self {
        self.irqchip = true;
        let made = self.fd.create_irq_chip();
        made.expect("an interrupt controller can be made");
        self
    }

    /// A VM with this many vCPUs that count.
    pub fn counting(vcpus: u32) -> Self {
        Self::running(Guest::Count, vcpus)
    }

    /// A VM with this many vCPUs that do the same.
    pub fn running(guest: Guest, vcpus: u32) -> Self {
        let mut vm = Self::new();
        for _ in 0..vcpus {
            vm.start(guest);
        }
        vm
    }

    /// The number of its descriptor.
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Answer to `KVM_CHECK_EXTENSION`.
    pub fn capability(&self, number: u32) -> i32 {
        self.fd.check_extension_raw(number.into())
    }

    /// Makes `len` bytes of `memory` a slot, or no slot if `len` is 0.
    #[track_caller]
    fn set_slot(&self, slot: u32, gpa: u64, memory: &Memory, len: usize, flags: u32) {
        assert!(len <= memory.len);
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: len as u64,
            userspace_addr: memory.address() as u64,
        };
        // SAFETY: the memory lasts for ever and is used by nothing but atomic accesses.
        let set = unsafe { self.fd.set_user_memory_region(region) };
        set.expect("the slot can be set");
    }

    /// Adds a slot.
    #[track_caller]
    pub fn add_slot(&self, slot: u32, gpa: u64, memory: &Memory) {
        self.set_slot(slot, gpa, memory, memory.len, 0);
    }

    /// Adds a slot that the guest can only read.
    #[track_caller]
    pub fn add_rom(&self, slot: u32, gpa: u64, memory: &Memory) {
        self.set_slot(slot, gpa, memory, memory.len, KVM_MEM_READONLY);
    }

    /// Removes a slot.
    #[track_caller]
    pub fn remove_slot(&self, slot: u32) {
        self.set_slot(slot, 0, &self.memory, 0, 0);
    }

    /// The numbers of the pages written since the last call; see [`Self::logging`].
    #[track_caller]
    pub fn dirty_pages(&self) -> Vec<usize> {
        let log = self.fd.get_dirty_log(0, MEMORY);
        let log = log.expect("the dirty log can be read");
        let dirty = |page: &usize| log[page / 64] & 1 << (page % 64) != 0;
        (0..MEMORY / PAGE).filter(dirty).collect()
    }

    /// Creates a vCPU that nobody runs, for as long as the result is kept.
    #[track_caller]
    pub fn create_vcpu(&mut self) -> VcpuFd {
        let vcpu = self.fd.create_vcpu(self.vcpus.into());
        self.vcpus += 1;
        vcpu.expect("a vCPU can be created")
    }

    /// Adds a vCPU that is ready to run, but for having been started if the VM has an interrupt
    /// controller.
    #[track_caller]
    fn prepare(&mut self, guest: Guest) -> (u32, VcpuFd) {
        let index = self.vcpus;
        let mut vcpu = self.create_vcpu();
        guest::set_up(&mut vcpu, guest, index);
        register_signal_handler(SIGRTMIN(), ignore).expect("a signal can be handled");
        (index, vcpu)
    }

    /// Adds a vCPU that runs when the test says so.
    #[track_caller]
    pub fn control(&mut self, guest: Guest) -> Vcpu {
        let (index, vcpu) = self.prepare(guest);
        if self.irqchip {
            guest::make_runnable(&vcpu);
        }
        Vcpu::new(vcpu, index)
    }

    /// Adds a vCPU that waits to be started by another one, as all but the first do in a VM with an
    /// interrupt controller.
    #[track_caller]
    pub fn control_unstarted(&mut self, guest: Guest) -> Vcpu {
        assert!(self.irqchip && self.vcpus != 0);
        let (index, vcpu) = self.prepare(guest);
        Vcpu::new(vcpu, index)
    }

    /// Adds a vCPU and runs it until the VM is dropped; returns its index when it has begun.
    #[track_caller]
    pub fn start(&mut self, guest: Guest) -> u32 {
        let (index, mut vcpu) = self.prepare(guest);
        if self.irqchip {
            guest::make_runnable(&vcpu);
        }
        let stop = self.stop.clone();
        let (tid, started) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            sys::avoid_cpu0();
            // The receiver waits for it.
            let _ = tid.send(rustix::thread::gettid().as_raw_nonzero().get());
            run(&mut vcpu, &stop);
        });
        let tid = started.recv_timeout(soon()).expect("the thread starts");
        self.threads.push(VcpuThread {
            thread,
            tid,
            index,
            guest,
        });
        wait_for("the vCPU runs", || self.count(index) != 0);
        index
    }

    /// How far a vCPU has counted.
    pub fn count(&self, index: u32) -> u32 {
        let counter = guest::counter(index);
        self.memory.number(counter).load(Ordering::Relaxed)
    }

    /// What a vCPU's exception handler has seen last.
    pub fn record(&self, index: u32) -> Record {
        guest::record(&self.memory, index)
    }

    /// Fails the test unless this vCPU counts on.
    #[track_caller]
    pub fn expect_progress_of(&self, index: u32) {
        let before = self.count(index);
        wait_for("the guest goes on", || self.count(index) != before);
    }

    /// Sends a signal to the thread of the vCPU that was started as number `nth`.
    pub fn signal(&self, nth: usize) {
        let sent = self.threads[nth].thread.kill(SIGRTMIN());
        sent.expect("a signal can be sent");
    }

    /// Fails the test unless all vCPUs that count go on.
    #[track_caller]
    pub fn expect_progress(&self) {
        for vcpu in self.threads.iter().filter(|vcpu| vcpu.guest.counts()) {
            self.expect_progress_of(vcpu.index);
        }
    }

    /// Waits until the thread of the vCPU that was started as number `nth` sleeps.
    #[track_caller]
    pub fn wait_until_asleep(&self, nth: usize) {
        let path = format!("/proc/self/task/{}/stat", self.threads[nth].tid);
        wait_for("the vCPU sleeps", || {
            let stat = std::fs::read_to_string(&path).unwrap_or_default();
            stat.rsplit(')')
                .next()
                .is_some_and(|rest| rest.starts_with(" S"))
        });
    }

    /// Whether the thread of the vCPU that was started as number `nth` has ended.
    pub fn has_ended(&self, nth: usize) -> bool {
        self.threads[nth].thread.is_finished()
    }

    /// Hooks the VM to a new tool.
    #[track_caller]
    pub fn hook(&self) -> Tool {
        let tool = Tool::new();
        sys::hook(self, tool.vmm_fd()).expect("the VM can be hooked");
        tool
    }

    /// Hooks the VM to a new tool that may do everything.
    #[track_caller]
    pub fn hook_allowing_all(&self) -> Tool {
        let tool = self.hook();
        sys::allow_all(self);
        tool
    }

    /// Ends the introspection, which must not take long.
    #[track_caller]
    pub fn unhook(&self) {
        let unhooked = crate::util::promptly("UNHOOK", || sys::unhook(self));
        unhooked.expect("UNHOOK succeeds");
    }

    /// Fails the test unless the VM can be hooked, used and unhooked, and its vCPUs run.
    #[track_caller]
    pub fn expect_usable(&self) {
        let mut tool = self.hook_allowing_all();
        self.memory.write(SCRATCH, b"usable");
        assert_eq!(tool.read(SCRATCH, 6).as_deref(), Ok(&b"usable"[..]));
        self.unhook();
        tool.expect_closed();
        self.expect_progress();
    }
}

impl AsFd for TestVm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the VM's descriptor is open as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }
}

impl Drop for TestVm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for VcpuThread { thread, .. } in self.threads.drain(..) {
            // A signal that comes just before KVM_RUN is lost, so one may not do.
            while !thread.is_finished() {
                let _ = thread.kill(SIGRTMIN());
                thread::sleep(Duration::from_millis(1));
            }
            // A panic there has ended the process.
            let _ = thread.join();
        }
    }
}

/// A signal ends KVM_RUN, and does nothing else.
extern "C" fn ignore(_: i32, _: *mut siginfo_t, _: *mut c_void) {}

/// Runs a vCPU until it is told to stop, from outside or by the guest.
fn run(vcpu: &mut VcpuFd, stop: &AtomicBool) {
    const EINTR: i32 = 4;
    const EAGAIN: i32 = 11;
    while !stop.load(Ordering::SeqCst) {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => return,
            Ok(exit) => panic!("unexpected exit of the guest: {exit:?}"),
            Err(error) if [EINTR, EAGAIN].contains(&error.errno()) => {}
            Err(error) => panic!("KVM_RUN: {error}"),
        }
    }
}
