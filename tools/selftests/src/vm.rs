// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tiny VMs: a few MiB of memory, and vCPUs that count, halt or do nothing.

use std::{
    ops::{Deref, DerefMut},
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::Ordering,
};

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use tiny_vm::{Runner, Vm};

use crate::{
    guest::{self, Record},
    memory::Memory,
    sys,
    tool::Tool,
    util::wait_for,
    vcpu::Vcpu,
};

pub use crate::guest::{Guest, STOP};
pub use tiny_vm::{MEMORY, PAGE, SCRATCH};

struct VcpuThread {
    runner: Runner,
    index: u32,
    guest: Guest,
}

/// A VM of the test's own, that stops when it is dropped.
pub struct TestVm {
    threads: Vec<VcpuThread>,
    vm: Vm,
}

impl TestVm {
    /// A VM without memory or anything else.
    pub fn bare() -> Result<Self, kvm_ioctls::Error> {
        Vm::bare().map(Self::from)
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
        Vm::with_memory(memory, flags).into()
    }

    /// Adds an interrupt controller, before the first vCPU.
    pub fn with_irqchip(mut self) -> Self {
        self.add_irqchip();
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

    /// Adds a vCPU that runs when the test says so.
    #[track_caller]
    pub fn control(&mut self, guest: Guest) -> Vcpu {
        let (index, vcpu) = self.prepare_started(guest);
        Vcpu::new(vcpu, index)
    }

    /// Adds a vCPU that waits to be started by another one, as all but the first do in a VM with an
    /// interrupt controller.
    #[track_caller]
    pub fn control_unstarted(&mut self, guest: Guest) -> Vcpu {
        let (index, vcpu) = self.prepare(guest);
        assert!(self.has_irqchip() && index != 0);
        Vcpu::new(vcpu, index)
    }

    /// Adds a vCPU and runs it until the VM is dropped; returns its index when it has begun.
    #[track_caller]
    pub fn start(&mut self, guest: Guest) -> u32 {
        let (index, vcpu) = self.prepare_started(guest);
        self.threads.push(VcpuThread {
            runner: Runner::start(vcpu),
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
        self.threads[nth].runner.signal();
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
        let runner = &self.threads[nth].runner;
        wait_for("the vCPU sleeps", || runner.is_asleep());
    }

    /// Whether the thread of the vCPU that was started as number `nth` has ended.
    pub fn has_ended(&self, nth: usize) -> bool {
        self.threads[nth].runner.has_ended()
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

impl From<Vm> for TestVm {
    fn from(vm: Vm) -> Self {
        Self {
            threads: Vec::new(),
            vm,
        }
    }
}

impl Deref for TestVm {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.vm
    }
}

impl DerefMut for TestVm {
    fn deref_mut(&mut self) -> &mut Vm {
        &mut self.vm
    }
}

impl AsFd for TestVm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.vm.as_fd()
    }
}

impl Drop for TestVm {
    fn drop(&mut self) {
        // All at once, and only then one by one.
        for vcpu in &self.threads {
            vcpu.runner.ask_to_stop();
        }
    }
}
