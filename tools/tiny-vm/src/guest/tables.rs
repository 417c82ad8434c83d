// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page tables and segment descriptors.

use crate::{memory::Memory, vm::SCRATCH};

/// Four levels of page tables: 1 GiB from 0 on is mapped to itself, and a few pages from [`HIGH`]
/// on.
pub const PML4: u64 = 0x4000;
const LOW_PDPT: u64 = 0x5000;
const LOW_PD: u64 = 0x6000;
const HIGH_PDPT: u64 = 0x7000;
const HIGH_PD: u64 = 0x8000;
/// The last level of what is mapped from [`HIGH`] on.
pub const HIGH_PT: u64 = 0x9000;
/// Two levels: 4 MiB are mapped to themselves, but for their last page.
pub const PD32: u64 = 0xa000;
const PT32: u64 = 0xb000;
/// Three levels, of PAE: 1 GiB is mapped to itself, but for its last 2 MiB.
pub const PAE_PDPT: u64 = 0xc800;
const PAE_PD: u64 = 0xf000;
/// Segment descriptors.
pub const GDT: u64 = 0xc000;
/// Its size in bytes.
pub const GDT_SIZE: u16 = 8 * DESCRIPTORS.len() as u16;

/// Selectors of code segments, by the size of operands.
pub const CODE64: u16 = 8;
pub const CODE32: u16 = 24;
pub const CODE16: u16 = 32;
/// Selector of the data segment.
pub const DATA: u16 = 16;

/// All of them have base 0 and no limit.
const DESCRIPTORS: [u64; 5] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x008f_9b00_0000_ffff,
];

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
/// Where the last page that 32-bit guests without PAE have mapped is.
pub const LAST32: u64 = 0x3f_f000;
/// The last 2 MiB that guests with PAE have mapped: to [`LARGE_GPA`], which is beyond 4 GiB.
pub const LAST_PAE: u64 = 0x3fe0_0000;

/// Another GiB of 64-bit guests that is mapped to itself, by one entry where the CPU has such.
pub const GIGABYTE: u64 = 1 << 30;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const LARGE_PAGE: u64 = 0x80;

/// Writes the tables of all guests.
pub fn install(memory: &Memory) {
    let entry = |table: u64, index: u64, value: u64| {
        memory.write(table + 8 * index, &value.to_le_bytes());
    };
    let all = PRESENT | WRITABLE | USER;
    entry(PML4, 0, LOW_PDPT | PRESENT | WRITABLE);
    entry(LOW_PDPT, 0, LOW_PD | PRESENT | WRITABLE);
    entry(LOW_PDPT, 1, GIGABYTE | LARGE_PAGE | PRESENT | WRITABLE);
    // Other bits of this one are reserved.
    entry(PAE_PDPT, 0, PAE_PD | PRESENT);
    for large in 0..512 {
        let mapping = large << 21 | LARGE_PAGE | PRESENT | WRITABLE;
        entry(LOW_PD, large, mapping);
        entry(PAE_PD, large, mapping);
    }
    entry(PAE_PD, 511, LARGE_GPA | LARGE_PAGE | PRESENT | WRITABLE);
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

    for (nth, descriptor) in (0..).zip(DESCRIPTORS) {
        memory.write(GDT + 8 * nth, &u64::to_le_bytes(descriptor));
    }
}

const _: () = assert!(PT32 + 0x1000 <= GDT);
const _: () = assert!(PAE_PD + 0x1000 <= SCRATCH);
