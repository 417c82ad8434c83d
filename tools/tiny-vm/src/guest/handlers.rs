// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Handlers of all exceptions, in each mode: they write a [`Record`] and return.

use super::tables::{CODE32, CODE64};
use crate::memory::Memory;

/// Exceptions of x86.
const VECTORS: u8 = 32;

/// Where the interrupt descriptors of 64-bit handlers are: those of long mode.
pub const IDT64: u64 = 0xc400;
/// Where those of 32-bit handlers are: those of protected mode.
pub const IDT32: u64 = 0xc600;
/// Sizes of both.
pub const IDT64_SIZE: u16 = 16 * VECTORS as u16;
pub const IDT32_SIZE: u16 = 8 * VECTORS as u16;
/// Real mode has its vectors at address 0.
const VECTOR_TABLE: u64 = 0;

const STUBS64: u64 = 0xd000;
const STUBS32: u64 = 0xd200;
const STUBS16: u64 = 0xd600;
const STUB_STRIDE: u64 = 16;
const HANDLER64: u64 = 0xd400;
const HANDLER32: u64 = 0xd480;
const HANDLER16: u64 = 0xd4c0;

const RECORDS: u64 = 0xe000;
const RECORD_STRIDE: u64 = 64;

/// Writes vector, error code, CR2 and RIP to (%rdi), counts at 32(%rdi), returns:
/// `push %rax; mov 8(%rsp), %rax; mov %rax, (%rdi); mov 16(%rsp), %rax; mov %rax, 8(%rdi);`
/// `mov %cr2, %rax; mov %rax, 16(%rdi); mov 24(%rsp), %rax; mov %rax, 24(%rdi);`
/// `incl 32(%rdi); pop %rax; add $16, %rsp; iretq`
const HANDLE64: &[u8] = &[
    0x50, 0x48, 0x8b, 0x44, 0x24, 0x08, 0x48, 0x89, 0x07, 0x48, 0x8b, 0x44, 0x24, 0x10, 0x48, 0x89,
    0x47, 0x08, 0x0f, 0x20, 0xd0, 0x48, 0x89, 0x47, 0x10, 0x48, 0x8b, 0x44, 0x24, 0x18, 0x48, 0x89,
    0x47, 0x18, 0xff, 0x47, 0x20, 0x58, 0x48, 0x83, 0xc4, 0x10, 0x48, 0xcf,
];
/// The same with 32 bits:
/// `push %eax; mov 4(%esp), %eax; mov %eax, (%edi); mov 8(%esp), %eax; mov %eax, 8(%edi);`
/// `mov %cr2, %eax; mov %eax, 16(%edi); mov 12(%esp), %eax; mov %eax, 24(%edi);`
/// `incl 32(%edi); pop %eax; add $8, %esp; iret`
const HANDLE32: &[u8] = &[
    0x50, 0x8b, 0x44, 0x24, 0x04, 0x89, 0x07, 0x8b, 0x44, 0x24, 0x08, 0x89, 0x47, 0x08, 0x0f, 0x20,
    0xd0, 0x89, 0x47, 0x10, 0x8b, 0x44, 0x24, 0x0c, 0x89, 0x47, 0x18, 0xff, 0x47, 0x20, 0x58, 0x83,
    0xc4, 0x08, 0xcf,
];
/// The same in real mode, without error code and CR2:
/// `push %ax; push %bp; mov %sp, %bp; mov 4(%bp), %ax; mov %ax, (%di); mov 6(%bp), %ax;`
/// `mov %ax, 24(%di); incw 32(%di); pop %bp; pop %ax; add $2, %sp; iret`
const HANDLE16: &[u8] = &[
    0x50, 0x55, 0x89, 0xe5, 0x8b, 0x46, 0x04, 0x89, 0x05, 0x8b, 0x46, 0x06, 0x89, 0x45, 0x18, 0xff,
    0x45, 0x20, 0x5d, 0x58, 0x83, 0xc4, 0x02, 0xcf,
];

/// Whether the processor pushes an error code, other than in real mode.
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// Writes handlers, and the tables through which the processor finds them.
pub fn install(memory: &Memory) {
    memory.write(HANDLER64, HANDLE64);
    memory.write(HANDLER32, HANDLE32);
    memory.write(HANDLER16, HANDLE16);
    for vector in 0..VECTORS {
        let index = u64::from(vector);
        let stub = |stubs| stubs + STUB_STRIDE * index;
        let faked = !has_error_code(vector);
        write_stub(memory, stub(STUBS64), vector, faked, HANDLER64, 4);
        write_stub(memory, stub(STUBS32), vector, faked, HANDLER32, 4);
        write_stub(memory, stub(STUBS16), vector, false, HANDLER16, 2);
        memory.write(IDT64 + 16 * index, &gate::<16>(stub(STUBS64), CODE64));
        memory.write(IDT32 + 8 * index, &gate::<8>(stub(STUBS32), CODE32));
        // Offset and segment.
        let real = (stub(STUBS16) as u32).to_le_bytes();
        memory.write(VECTOR_TABLE + 4 * index, &real);
    }
}

/// `push $0` in place of an error code, `push $vector; jmp handler`; the jump has an offset of so
/// many bytes.
fn write_stub(
    memory: &Memory,
    stub: u64,
    vector: u8,
    fake_error_code: bool,
    handler: u64,
    offset_len: usize,
) {
    let mut code = vec![];
    if fake_error_code {
        code.extend([0x6a, 0]);
    }
    code.extend([0x6a, vector, 0xe9]);
    let next = stub + (code.len() + offset_len) as u64;
    let offset = handler.wrapping_sub(next).to_le_bytes();
    code.extend(&offset[..offset_len]);
    memory.write(stub, &code);
}

/// The descriptor of an interrupt gate: of long mode with 16 bytes, of protected mode with 8.
fn gate<const SIZE: usize>(stub: u64, selector: u16) -> [u8; SIZE] {
    const PRESENT_INTERRUPT_GATE: u8 = 0x8e;
    let mut gate = [0; SIZE];
    // Lossless: it is below 64 KiB.
    gate[..2].copy_from_slice(&(stub as u16).to_le_bytes());
    gate[2..4].copy_from_slice(&selector.to_le_bytes());
    gate[5] = PRESENT_INTERRUPT_GATE;
    gate
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

/// Where a vCPU's handlers write their record: RDI points to it.
pub fn record_address(index: u32) -> u64 {
    RECORDS + u64::from(index) * RECORD_STRIDE
}

/// Reads what a vCPU's handler has written.
pub fn record(memory: &Memory, index: u32) -> Record {
    let bytes = memory.read(record_address(index), 40);
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

const _: () = assert!(IDT64 + IDT64_SIZE as u64 <= IDT32);
const _: () = assert!(STUBS64 + STUB_STRIDE * VECTORS as u64 <= STUBS32);
const _: () = assert!(STUBS32 + STUB_STRIDE * VECTORS as u64 <= HANDLER64);
const _: () = assert!(HANDLER64 + HANDLE64.len() as u64 <= HANDLER32);
const _: () = assert!(HANDLER32 + HANDLE32.len() as u64 <= HANDLER16);
const _: () = assert!(HANDLER16 + HANDLE16.len() as u64 <= STUBS16);
