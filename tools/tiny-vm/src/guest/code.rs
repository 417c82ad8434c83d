// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The machine code that guests run, and where it is.

use crate::memory::Memory;

/// `1: incl (%bx); cmpb $0, STOP; je 1b; out %al, $0x10; hlt`
pub const COUNT_CODE: u64 = 0x1000;
/// `1: incl (%bx); hlt; jmp 1b`
pub const HALT_CODE: u64 = 0x1100;
/// `1: incl (%rbx); cmpb $0, STOP; je 1b; out %al, $0x10; hlt`
pub const COUNT64_CODE: u64 = 0xd800;
/// `1: movdqu %xmm0, (%rsi); incl (%rbx); jmp 1b`
pub const STORE_XMM_CODE: u64 = 0xd880;
/// Where [`Guest::Spin`](super::Guest::Spin) is: `1: jmp 1b`, in every mode
pub const SPIN_CODE: u64 = 0xd900;
/// An INT3 that nobody runs, in front of what [`Guest::Spin`](super::Guest::Spin) does:
/// `int3; 1: jmp 1b`
pub const INT3_CODE: u64 = 0xd940;
/// An INTO like that: `into; 1: jmp 1b`
pub const INTO_CODE: u64 = 0xd960;
/// Code that ends a vCPU the way a write to [`STOP`](super::STOP) does: `out %al, $0x10; hlt`
pub const OUT_CODE: u64 = 0xd980;

/// What is at these addresses.
const CODE: [(u64, &[u8]); 8] = [
    (
        COUNT_CODE,
        &[
            0x66, 0xff, 0x07, 0x80, 0x3e, 0xf0, 0x2f, 0x00, 0x74, 0xf6, 0xe6, 0x10, 0xf4,
        ],
    ),
    (HALT_CODE, &[0x66, 0xff, 0x07, 0xf4, 0xeb, 0xfa]),
    (
        COUNT64_CODE,
        &[
            0xff, 0x03, 0x80, 0x3c, 0x25, 0xf0, 0x2f, 0x00, 0x00, 0x00, 0x74, 0xf4, 0xe6, 0x10,
            0xf4,
        ],
    ),
    (
        STORE_XMM_CODE,
        &[0xf3, 0x0f, 0x7f, 0x06, 0xff, 0x03, 0xeb, 0xf8],
    ),
    (SPIN_CODE, &[0xeb, 0xfe]),
    (INT3_CODE, &[0xcc, 0xeb, 0xfe]),
    (INTO_CODE, &[0xce, 0xeb, 0xfe]),
    (OUT_CODE, &[0xe6, 0x10, 0xf4]),
];

/// Writes the code of all guests.
pub fn install(memory: &Memory) {
    for (address, code) in CODE {
        memory.write(address, code);
    }
}
