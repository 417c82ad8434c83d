// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the guests do, and in which mode.
//!
//! Everything is below [`SCRATCH`](crate::vm::SCRATCH). In each mode,
//! exceptions have a handler that writes a [`Record`] and returns.

use kvm_bindings::{
    kvm_mp_state, kvm_segment, kvm_sregs, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE,
};
use kvm_ioctls::{Kvm, VcpuFd};
use kvmi_abi::arch::Regs;

use crate::{memory::Memory, vm::SCRATCH};

mod code;
mod handlers;
mod tables;

pub use code::{INT3_CODE, INTO_CODE, OUT_CODE, SPIN_CODE};
pub use handlers::{has_error_code, record, Record};
pub use tables::{GIGABYTE, HIGH, HIGH_PAGES, HIGH_PT, LARGE, LARGE_GPA, LAST32, LAST_PAE, PML4};

use code::{COUNT64_CODE, COUNT_CODE, HALT_CODE, STORE_XMM_CODE};
use handlers::{IDT32, IDT32_SIZE, IDT64, IDT64_SIZE};
use tables::{CODE16, CODE32, CODE64, DATA, GDT, GDT_SIZE, PAE_PDPT, PD32};

/// A mode of the processor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Real mode.
    Real,
    /// Protected mode, 16-bit code.
    Protected16,
    /// Protected mode, 32-bit code, no paging.
    Protected32,
    /// Protected mode, 32-bit code, two levels of page tables.
    Paged32,
    /// Protected mode, 32-bit code, page tables of PAE.
    Pae32,
    /// Long mode, 16-bit code.
    Compat16,
    /// Long mode, 32-bit code.
    Compat32,
    /// Long mode, 64-bit code.
    Long,
}

impl Mode {
    /// All of them, with the default size of operands (8 for 64-bit code).
    pub const ALL: [(Self, u8); 8] = [
        (Self::Real, 2),
        (Self::Protected16, 2),
        (Self::Protected32, 4),
        (Self::Paged32, 4),
        (Self::Pae32, 4),
        (Self::Compat16, 2),
        (Self::Compat32, 4),
        (Self::Long, 8),
    ];
}

/// What a vCPU does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Guest {
    /// Counts as fast as it can, in real mode.
    Count,
    /// Counts one, and halts for good; the VM needs an interrupt controller.
    Halt,
    /// Counts as fast as it can, in 64-bit mode; survives exceptions.
    Count64,
    /// Counts, and writes XMM0 to memory each time, in 64-bit mode.
    StoreXmm,
    /// Jumps to itself: no register changes.
    Spin(Mode),
}

impl Guest {
    /// Whether it counts again and again.
    pub fn counts(self) -> bool {
        matches!(self, Self::Count | Self::Count64 | Self::StoreXmm)
    }

    fn mode(self) -> Mode {
        match self {
            Self::Count | Self::Halt => Mode::Real,
            Self::Count64 | Self::StoreXmm => Mode::Long,
            Self::Spin(mode) => mode,
        }
    }

    fn code(self) -> u64 {
        match self {
            Self::Count => COUNT_CODE,
            Self::Halt => HALT_CODE,
            Self::Count64 => COUNT64_CODE,
            Self::StoreXmm => STORE_XMM_CODE,
            Self::Spin(_) => SPIN_CODE,
        }
    }
}

/// Guest physical address where a byte other than 0 ends every counting vCPU, but for those of
/// [`Guest::StoreXmm`].
pub const STOP: u64 = 0x2ff0;

/// Guest physical address of memory that no guest uses, for what code of all modes reaches.
pub const LOW: u64 = 0x3400;
/// Its size in bytes.
pub const LOW_SIZE: u64 = 0xc00;

const COUNTERS: u64 = 0x3000;
const COUNTER_STRIDE: u64 = 64;

const XMM_VALUES: u64 = 0xe800;
const XMM_STRIDE: u64 = 16;
// Large enough for several exceptions in the middle of each other's handlers.
const STACKS: u64 = 0x1200;
const STACK_SIZE: u64 = 0x380;
/// vCPUs that there is memory for.
const MAX_VCPUS: u32 = 8;

/// Writes code and tables of all guests.
pub fn install(memory: &Memory) {
    code::install(memory);
    tables::install(memory);
    handlers::install(memory);
}

/// Sets the registers of a new vCPU.
#[track_caller]
pub fn set_up(vcpu: &mut VcpuFd, guest: Guest, index: u32) {
    assert!(index < MAX_VCPUS);
    if guest.mode() != Mode::Real {
        let kvm = Kvm::new().expect("/dev/kvm can be opened");
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let cpuid = cpuid.expect("CPUID can be read");
        vcpu.set_cpuid2(&cpuid).expect("CPUID can be set");
    }
    let mut sregs = vcpu.get_sregs().expect("registers can be read");
    set_mode(&mut sregs, guest.mode());
    vcpu.set_sregs(&sregs).expect("registers can be set");
    let mut regs = vcpu.get_regs().expect("registers can be read");
    regs.rip = guest.code();
    regs.rbx = counter(index);
    regs.rdi = handlers::record_address(index);
    regs.rsi = xmm_value(index);
    regs.rsp = STACKS + u64::from(index + 1) * STACK_SIZE;
    // With interrupts on: Bochs holds back those of the host while a guest has them off.
    regs.rflags = 0x202;
    vcpu.set_regs(&regs).expect("registers can be set");
}

/// Starts a vCPU of a VM with an interrupt controller, without INIT and SIPI.
#[track_caller]
pub fn make_runnable(vcpu: &VcpuFd) {
    let runnable = kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    };
    vcpu.set_mp_state(runnable).expect("a vCPU can be started");
}

fn set_mode(sregs: &mut kvm_sregs, mode: Mode) {
    const PE: u64 = 1;
    // MP, ET, NE, WP
    const CR0_OTHERS: u64 = 0x1_0032;
    const PG: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    // OSFXSR, OSXMMEXCPT
    const SSE: u64 = 3 << 9;
    // LME, LMA
    const LONG: u64 = 5 << 8;

    if mode == Mode::Real {
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            segment.base = 0;
            segment.selector = 0;
        }
        return;
    }
    let (selector, db, l) = match mode {
        Mode::Protected16 | Mode::Compat16 => (CODE16, 0, 0),
        Mode::Long => (CODE64, 0, 1),
        _ => (CODE32, 1, 0),
    };
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector,
        type_: 11,
        db,
        l,
        ..flat
    };
    let data = kvm_segment {
        selector: DATA,
        type_: 3,
        db: 1,
        ..flat
    };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = GDT_SIZE - 1;
    (sregs.idt.base, sregs.idt.limit) = (IDT32, IDT32_SIZE - 1);
    sregs.cr0 = PE | CR0_OTHERS;
    match mode {
        Mode::Compat16 | Mode::Compat32 | Mode::Long => {
            sregs.cr0 |= PG;
            sregs.cr3 = PML4;
            sregs.cr4 = PAE | SSE;
            sregs.efer = LONG;
            (sregs.idt.base, sregs.idt.limit) = (IDT64, IDT64_SIZE - 1);
        }
        Mode::Paged32 => {
            sregs.cr0 |= PG;
            sregs.cr3 = PD32;
        }
        Mode::Pae32 => {
            sregs.cr0 |= PG;
            sregs.cr3 = PAE_PDPT;
            sregs.cr4 = PAE;
        }
        _ => {}
    }
}

/// Address of a vCPU's counter.
pub fn counter(index: u32) -> u64 {
    COUNTERS + u64::from(index) * COUNTER_STRIDE
}

/// Address where [`Guest::StoreXmm`] writes.
pub fn xmm_value(index: u32) -> u64 {
    XMM_VALUES + u64::from(index) * XMM_STRIDE
}

/// Different values for all registers that [`Guest::Spin`] does not need.
pub fn odd_values(regs: &mut Regs) {
    let number = |nth: u64| 0x1111_2222_3333_0000 * nth + nth;
    (regs.rax, regs.rcx, regs.rdx) = (number(1), number(2), number(3));
    (regs.rbp, regs.r8, regs.r9) = (number(4), number(5), number(6));
    (regs.r10, regs.r11, regs.r12) = (number(7), number(8), number(9));
    (regs.r13, regs.r14, regs.r15) = (number(10), number(11), number(12));
}

const _: () = assert!(STACKS + STACK_SIZE * MAX_VCPUS as u64 <= STOP);
const _: () = assert!(COUNTERS + COUNTER_STRIDE * MAX_VCPUS as u64 <= LOW);
const _: () = assert!(LOW + LOW_SIZE <= PML4);
const _: () = assert!(XMM_VALUES + XMM_STRIDE * MAX_VCPUS as u64 <= SCRATCH);
