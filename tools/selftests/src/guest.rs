// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the guests run, in which mode, and the tables that they need for it.
//!
//! Everything is below [`SCRATCH`](crate::vm::SCRATCH). In 64-bit mode each exception has a handler
//! that writes a [`Record`] and returns.

use kvm_bindings::{
    kvm_mp_state, kvm_segment, kvm_sregs, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE,
};
use kvm_ioctls::{Kvm, VcpuFd};
use kvmi_abi::arch::Regs;

use crate::{
    memory::Memory,
    vm::{PAGE, SCRATCH},
};

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
    /// Long mode, 16-bit code.
    Compat16,
    /// Long mode, 32-bit code.
    Compat32,
    /// Long mode, 64-bit code.
    Long,
}

impl Mode {
    /// All of them, with the default size of operands (8 for 64-bit code).
    pub const ALL: [(Self, u8); 7] = [
        (Self::Real, 2),
        (Self::Protected16, 2),
        (Self::Protected32, 4),
        (Self::Paged32, 4),
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

const COUNT_CODE: u64 = 0x1000;
const HALT_CODE: u64 = 0x1100;
const COUNTERS: u64 = 0x3000;
const COUNTER_STRIDE: u64 = 64;

// Four levels of page tables: 1 GiB from 0 on is mapped to itself, and a few pages from HIGH on.
const PML4: u64 = 0x4000;
const LOW_PDPT: u64 = 0x5000;
const LOW_PD: u64 = 0x6000;
const HIGH_PDPT: u64 = 0x7000;
const HIGH_PD: u64 = 0x8000;
const HIGH_PT: u64 = 0x9000;
// Two levels: 4 MiB are mapped to themselves, but for their last page.
const PD32: u64 = 0xa000;
const PT32: u64 = 0xb000;
const GDT: u64 = 0xc000;
const IDT: u64 = 0xc400;
const STUBS: u64 = 0xd000;
const STUB_STRIDE: u64 = 16;
const HANDLER: u64 = 0xd400;
const COUNT64_CODE: u64 = 0xd800;
const STORE_XMM_CODE: u64 = 0xd880;
/// Where [`Guest::Spin`] is.
pub const SPIN_CODE: u64 = 0xd900;
/// An INT3 that nobody runs; [`Guest::Spin`]'s code follows it.
pub const INT3_CODE: u64 = 0xd940;
/// Code that ends a vCPU the way a write to [`STOP`] does.
pub const OUT_CODE: u64 = 0xd980;
const RECORDS: u64 = 0xe000;
const RECORD_STRIDE: u64 = 64;
const XMM_VALUES: u64 = 0xe800;
const XMM_STRIDE: u64 = 16;
// Large enough for several exceptions in the middle of each other's handlers.
const STACKS: u64 = 0x1200;
const STACK_SIZE: u64 = 0x380;
/// vCPUs that there is memory for.
const MAX_VCPUS: u32 = 8;

/// Exceptions of x86.
pub const VECTORS: u8 = 32;
const CODE64: u16 = 8;
const DATA: u16 = 16;

/// A virtual address of 64-bit guests from which on pages are mapped as [`HIGH_PAGES`] tells.
pub const HIGH: u64 = 0xffff_8000_0000_0000;
/// Pages from [`HIGH`] on: to which guest physical address, with which flags.
pub const HIGH_PAGES: [(u64, u64); 4] = [
    (SCRATCH, PRESENT | WRITABLE),
    (0, 0),
    // For user space, too.
    (SCRATCH + 0x3000, PRESENT | WRITABLE | USER),
    // Read-only, and there need not be memory.
    (0x12_3456_7000, PRESENT),
];
/// A virtual address of 64-bit guests that is mapped by an entry for 2 MiB.
pub const LARGE: u64 = HIGH + 0x20_0000;
/// Where to.
pub const LARGE_GPA: u64 = 0x1_4000_0000;
/// Where the last page that 32-bit guests have mapped is.
pub const LAST32: u64 = 0x3f_f000;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const LARGE_PAGE: u64 = 0x80;

/// `1: incl (%bx); cmpb $0, STOP; je 1b; out %al, $0x10; hlt`
const COUNT: &[u8] = &[
    0x66, 0xff, 0x07, 0x80, 0x3e, 0xf0, 0x2f, 0x00, 0x74, 0xf6, 0xe6, 0x10, 0xf4,
];
/// `1: incl (%bx); hlt; jmp 1b`
const HALT: &[u8] = &[0x66, 0xff, 0x07, 0xf4, 0xeb, 0xfa];
/// `1: incl (%rbx); cmpb $0, STOP; je 1b; out %al, $0x10; hlt`
const COUNT64: &[u8] = &[
    0xff, 0x03, 0x80, 0x3c, 0x25, 0xf0, 0x2f, 0x00, 0x00, 0x00, 0x74, 0xf4, 0xe6, 0x10, 0xf4,
];
/// `1: movdqu %xmm0, (%rsi); incl (%rbx); jmp 1b`
const STORE_XMM: &[u8] = &[0xf3, 0x0f, 0x7f, 0x06, 0xff, 0x03, 0xeb, 0xf8];
/// `1: jmp 1b`, in every mode
const SPIN: &[u8] = &[0xeb, 0xfe];
/// `int3; 1: jmp 1b`
const INT3: &[u8] = &[0xcc, 0xeb, 0xfe];
/// `out %al, $0x10; hlt`
const OUT: &[u8] = &[0xe6, 0x10, 0xf4];
/// Writes vector, error code, CR2 and RIP to (%rdi), counts at 32(%rdi), returns:
/// `push %rax; mov 8(%rsp), %rax; mov %rax, (%rdi); mov 16(%rsp), %rax; mov %rax, 8(%rdi);`
/// `mov %cr2, %rax; mov %rax, 16(%rdi); mov 24(%rsp), %rax; mov %rax, 24(%rdi);`
/// `incl 32(%rdi); pop %rax; add $16, %rsp; iretq`
const HANDLE: &[u8] = &[
    0x50, 0x48, 0x8b, 0x44, 0x24, 0x08, 0x48, 0x89, 0x07, 0x48, 0x8b, 0x44, 0x24, 0x10, 0x48, 0x89,
    0x47, 0x08, 0x0f, 0x20, 0xd0, 0x48, 0x89, 0x47, 0x10, 0x48, 0x8b, 0x44, 0x24, 0x18, 0x48, 0x89,
    0x47, 0x18, 0xff, 0x47, 0x20, 0x58, 0x48, 0x83, 0xc4, 0x10, 0x48, 0xcf,
];

/// Whether the processor pushes an error code.
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// Writes code and tables of all guests.
pub fn install(memory: &Memory) {
    for (address, code) in [
        (COUNT_CODE, COUNT),
        (HALT_CODE, HALT),
        (COUNT64_CODE, COUNT64),
        (STORE_XMM_CODE, STORE_XMM),
        (SPIN_CODE, SPIN),
        (INT3_CODE, INT3),
        (OUT_CODE, OUT),
        (HANDLER, HANDLE),
    ] {
        memory.write(address, code);
    }
    let entry = |table: u64, index: u64, value: u64| {
        memory.write(table + 8 * index, &value.to_le_bytes());
    };
    let all = PRESENT | WRITABLE | USER;
    entry(PML4, 0, LOW_PDPT | PRESENT | WRITABLE);
    entry(LOW_PDPT, 0, LOW_PD | PRESENT | WRITABLE);
    for large in 0..512 {
        entry(LOW_PD, large, large << 21 | LARGE_PAGE | PRESENT | WRITABLE);
    }
    entry(PML4, 256, HIGH_PDPT | all);
    entry(HIGH_PDPT, 0, HIGH_PD | all);
    entry(HIGH_PD, 0, HIGH_PT | all);
    entry(HIGH_PD, 1, LARGE_GPA | LARGE_PAGE | PRESENT | WRITABLE);
    for (page, (gpa, flags)) in (0..).zip(HIGH_PAGES) {
        entry(HIGH_PT, page, gpa | flags);
    }

    // Lossless: all of these are below 4 GiB.
    let entry = |table: u64, index: u64, value: u64| {
        memory.write(table + 4 * index, &(value as u32).to_le_bytes());
    };
    entry(PD32, 0, PT32 | PRESENT | WRITABLE);
    for page in 0..1023 {
        entry(PT32, page, page << 12 | PRESENT | WRITABLE);
    }
    entry(PT32, 1023, SCRATCH | PRESENT | WRITABLE);

    let descriptors = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (nth, descriptor) in (0..).zip(descriptors) {
        memory.write(GDT + 8 * nth, &u64::to_le_bytes(descriptor));
    }
    for vector in 0..VECTORS {
        install_handler(memory, vector);
    }
}

/// `push $0` if the processor pushes no error code, `push $vector; jmp HANDLER`
fn install_handler(memory: &Memory, vector: u8) {
    let stub = STUBS + STUB_STRIDE * u64::from(vector);
    let mut code = vec![];
    if !has_error_code(vector) {
        code.extend([0x6a, 0]);
    }
    code.extend([0x6a, vector, 0xe9]);
    let next = stub + code.len() as u64 + 4;
    code.extend(((HANDLER - next) as u32).to_le_bytes());
    memory.write(stub, &code);

    let mut gate = [0; 16];
    gate[..2].copy_from_slice(&(stub as u16).to_le_bytes());
    gate[2..4].copy_from_slice(&CODE64.to_le_bytes());
    gate[5] = 0x8e;
    memory.write(IDT + 16 * u64::from(vector), &gate);
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
    regs.rdi = RECORDS + u64::from(index) * RECORD_STRIDE;
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
    let (db, l) = match mode {
        Mode::Protected16 | Mode::Compat16 => (0, 0),
        Mode::Long => (0, 1),
        _ => (1, 0),
    };
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: CODE64,
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
    sregs.gdt.limit = 3 * 8 - 1;
    sregs.idt.base = IDT;
    sregs.idt.limit = 16 * u16::from(VECTORS) - 1;
    sregs.cr0 = PE | CR0_OTHERS;
    match mode {
        Mode::Compat16 | Mode::Compat32 | Mode::Long => {
            sregs.cr0 |= PG;
            sregs.cr3 = PML4;
            sregs.cr4 = PAE | SSE;
            sregs.efer = LONG;
        }
        Mode::Paged32 => {
            sregs.cr0 |= PG;
            sregs.cr3 = PD32;
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

/// What a vCPU's handler has seen last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Record {
    /// The vector.
    pub vector: u64,
    /// The error code, or 0.
    pub error_code: u64,
    /// CR2
    pub cr2: u64,
    /// Where it returned to.
    pub rip: u64,
    /// How many exceptions there were.
    pub count: u64,
}

/// Reads what a vCPU's handler has written.
pub fn record(memory: &Memory, index: u32) -> Record {
    let bytes = memory.read(RECORDS + u64::from(index) * RECORD_STRIDE, 40);
    let number = |nth: usize| {
        let bytes = bytes[8 * nth..8 * nth + 8].try_into();
        u64::from_le_bytes(bytes.expect("eight bytes"))
    };
    Record {
        vector: number(0),
        error_code: number(1),
        cr2: number(2),
        rip: number(3),
        count: number(4),
    }
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
const _: () = assert!(XMM_VALUES + XMM_STRIDE * MAX_VCPUS as u64 <= SCRATCH);
const _: () = assert!(HANDLER >= STUBS + STUB_STRIDE * VECTORS as u64);
const _: () = assert!(PT32 as usize + PAGE <= GDT as usize);
