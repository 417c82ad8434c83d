// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A VM with memory and vCPUs that nobody runs yet.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd};

use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_READONLY};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};

use crate::{
    guest::{self, Guest},
    memory::Memory,
};

/// Size of a page.
pub const PAGE: usize = 4096;
/// Memory of a VM, from guest physical address 0 on.
pub const MEMORY: usize = 2 << 20;
/// Guest physical address of memory that no guest code uses, up to [`MEMORY`].
pub const SCRATCH: u64 = 0x1_0000;

/// A VM.
pub struct Vm {
    fd: VmFd,
    /// Its memory at guest physical address 0.
    pub memory: Memory,
    irqchip: bool,
    vcpus: u32,
}

impl Vm {
    /// A VM without memory or anything else.
    pub fn bare() -> Result<Self, kvm_ioctls::Error> {
        Ok(Self {
            fd: Kvm::new()?.create_vm()?,
            memory: Memory::new(0x4000),
            irqchip: false,
            vcpus: 0,
        })
    }

    /// A VM with [`MEMORY`] bytes of this memory, as slot 0, with the code of all guests in it.
    #[track_caller]
    pub fn with_memory(memory: Memory, flags: u32) -> Self {
        guest::install(&memory);
        let mut vm = Self::bare().expect("a VM can be created");
        vm.memory = memory;
        vm.set_slot(0, 0, &memory, MEMORY, flags);
        vm
    }

    /// Adds an interrupt controller, before the first vCPU.
    #[track_caller]
    pub fn add_irqchip(&mut self) {
        let made = self.fd.create_irq_chip();
        made.expect("an interrupt controller can be made");
        self.irqchip = true;
    }

    /// Whether it has an interrupt controller.
    pub fn has_irqchip(&self) -> bool {
        self.irqchip
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

    /// The numbers of the pages written since the last call, if slot 0 has a dirty log.
    #[track_caller]
    pub fn dirty_pages(&self) -> Vec<usize> {
        let log = self.fd.get_dirty_log(0, MEMORY);
        let log = log.expect("the dirty log can be read");
        let dirty = |page: &usize| log[page / 64] & 1 << (page % 64) != 0;
        (0..MEMORY / PAGE).filter(dirty).collect()
    }

    /// Denies the guests writes to these MSRs, and no others any more.
    #[track_caller]
    pub fn deny_msr_writes(&self, msrs: &[u32]) {
        let range = |msr: &u32| MsrFilterRange {
            flags: MsrFilterRangeFlags::WRITE,
            base: *msr,
            msr_count: 1,
            bitmap: &[0],
        };
        let ranges: Vec<_> = msrs.iter().map(range).collect();
        let set = self
            .fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges);
        set.expect("MSRs can be filtered");
    }

    /// Creates a vCPU that nobody runs, for as long as the result is kept.
    #[track_caller]
    pub fn create_vcpu(&mut self) -> VcpuFd {
        let vcpu = self.fd.create_vcpu(self.vcpus.into());
        self.vcpus += 1;
        vcpu.expect("a vCPU can be created")
    }

    /// Adds a vCPU that is ready to run, but for having been started if the VM has an interrupt
    /// controller; returns its index, too.
    #[track_caller]
    pub fn prepare(&mut self, guest: Guest) -> (u32, VcpuFd) {
        let index = self.vcpus;
        let mut vcpu = self.create_vcpu();
        guest::set_up(&mut vcpu, guest, index);
        (index, vcpu)
    }

    /// The same, and starts it.
    #[track_caller]
    pub fn prepare_started(&mut self, guest: Guest) -> (u32, VcpuFd) {
        let (index, vcpu) = self.prepare(guest);
        if self.irqchip {
            guest::make_runnable(&vcpu);
        }
        (index, vcpu)
    }
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the VM's descriptor is open as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }
}
