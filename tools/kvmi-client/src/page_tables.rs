// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The guest's page tables, read from outside.
//!
//! [`Connection::translate_gva`] asks KVM where an address is; this tells which entries of which
//! tables say so, for those who look after the tables themselves (Intel SDM volume 3 chapter 5,
//! AMD APM volume 2 chapter 5).

use std::os::fd::AsFd;

use kvmi_abi::arch::Sregs;

use crate::{connection::Connection, error::Result};

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

const PRESENT: u64 = 1;
/// Of an entry above the lowest level: it maps a page itself.
const LARGE: u64 = 1 << 7;
/// Bits of an entry of 8 bytes that are an address; what is above are flags.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// An entry of a page table that is used for the translation of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// 1 for a table of 4 KiB pages, up to 5.
    pub level: u8,
    /// Guest physical address of the entry.
    pub gpa: u64,
    /// What is in there.
    pub value: u64,
}

impl TableEntry {
    /// Whether there is a page or another table behind it.
    pub fn is_present(&self) -> bool {
        self.value & PRESENT != 0
    }
}

/// How addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Paging {
    /// Where the topmost table begins.
    root: u64,
    /// Its level.
    levels: u8,
    /// Bytes of an entry: 8, or 4 without PAE.
    entry: u64,
    /// Whether pages above 4 KiB exist.
    large: bool,
}

impl Paging {
    /// By the registers of a vCPU; nothing if addresses are physical.
    fn new(sregs: &Sregs) -> Option<Self> {
        if sregs.cr0 & CR0_PG == 0 {
            return None;
        }
        let (mask, levels, entry) = match (sregs.efer & EFER_LMA, sregs.cr4 & CR4_PAE) {
            (0, 0) => (0xffff_f000, 2, 4),
            (0, _) => (0xffff_ffe0, 3, 8),
            _ => (ADDRESS, 4 + u8::from(sregs.cr4 & CR4_LA57 != 0), 8),
        };
        Some(Self {
            root: sregs.cr3 & mask,
            levels,
            entry,
            large: entry == 8 || sregs.cr4 & CR4_PSE != 0,
        })
    }

    /// Reads the entries, from the topmost one on, until one maps a page or nothing.
    fn walk(
        &self,
        gva: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<Vec<TableEntry>> {
        // Without long mode, the topmost table of PAE has 4 entries.
        let gva = if self.levels > 3 {
            gva
        } else {
            gva & 0xffff_ffff
        };
        let mut entries = Vec::new();
        let mut table = self.root;
        // A table has 4 KiB, so it decodes 9 bits, or 10 with small entries.
        let bits = if self.entry == 8 { 9 } else { 10 };
        for level in (1..=self.levels).rev() {
            let index = gva >> (12 + bits * (u32::from(level) - 1)) & ((1 << bits) - 1);
            let gpa = table + index * self.entry;
            let mut bytes = [0; 8];
            let len = if self.entry == 8 { 8 } else { 4 };
            read(gpa, &mut bytes[..len])?;
            let value = u64::from_le_bytes(bytes);
            let entry = TableEntry { level, gpa, value };
            entries.push(entry);
            // What is this bit in a topmost entry of PAE or of long mode is reserved.
            let maps = self.large && (2..=3).contains(&level) && value & LARGE != 0;
            if !entry.is_present() || maps {
                break;
            }
            table = value & ADDRESS;
        }
        Ok(entries)
    }
}

impl<S: AsFd> Connection<S> {
    /// Reads the entries of the guest's page tables that translate a virtual address on a vCPU, the
    /// topmost one first. The last one maps the page, or is not present. There is none if the vCPU
    /// does not use page tables.
    ///
    /// The tables may change meanwhile, unless the vCPUs are paused.
    pub fn page_tables(&mut self, vcpu: u16, gva: u64) -> Result<Vec<TableEntry>> {
        let registers = self.get_registers(vcpu, &[])?;
        match Paging::new(&registers.sregs) {
            Some(paging) => paging.walk(gva, |gpa, bytes| self.read_physical(gpa, bytes)),
            None => Ok(Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn sregs(cr0: u64, cr4: u64, efer: u64) -> Sregs {
        Sregs {
            cr0,
            cr3: 0x1018,
            cr4,
            efer,
            ..Default::default()
        }
    }

    /// Walks tables of which only the entries at `memory` are not 0; tells `(level, gpa)`.
    fn walk(sregs: &Sregs, memory: &[(u64, u64)], gva: u64) -> Vec<(u8, u64)> {
        let memory: HashMap<u64, u64> = memory.iter().copied().collect();
        let read = |gpa: u64, bytes: &mut [u8]| {
            let value = memory.get(&gpa).copied().unwrap_or(0).to_le_bytes();
            bytes.copy_from_slice(&value[..bytes.len()]);
            Ok(())
        };
        let entries = Paging::new(sregs).unwrap().walk(gva, read).unwrap();
        entries
            .iter()
            .map(|entry| (entry.level, entry.gpa))
            .collect()
    }

    #[test]
    fn addresses_are_physical_without_paging() {
        assert_eq!(Paging::new(&sregs(1, CR4_PAE, 0)), None);
    }

    #[test]
    fn long_mode_has_four_levels_down_to_the_page() {
        let sregs = sregs(CR0_PG, CR4_PAE, EFER_LMA);
        let gva = 0xffff_8000_0000_0000 | 3 << 30 | 2 << 21 | 1 << 12;
        let memory = [
            // NX and the flags beside the address are no part of it.
            (0x1800, 0x8000_0000_0000_2067),
            (0x2018, 0x3003),
            (0x3010, 0x4003),
            (0x4008, 0x5003),
        ];
        let expected = [(4, 0x1800), (3, 0x2018), (2, 0x3010), (1, 0x4008)];
        assert_eq!(walk(&sregs, &memory, gva), expected);
        // A large page ends the walk; so does what is not present.
        let large = [memory[0], memory[1], (0x3010, 0x4083)];
        assert_eq!(walk(&sregs, &large, gva), expected[..3]);
        assert_eq!(walk(&sregs, &memory[..1], gva), expected[..2]);
    }

    #[test]
    fn long_mode_may_have_five_levels() {
        let sregs = sregs(CR0_PG, CR4_PAE | CR4_LA57, EFER_LMA);
        assert_eq!(
            walk(&sregs, &[(0x1008, 0x2003)], 1 << 48),
            [(5, 0x1008), (4, 0x2000)]
        );
    }

    #[test]
    fn pae_has_four_entries_at_the_top() {
        let sregs = sregs(CR0_PG, CR4_PAE, 0);
        let memory = [(0x1018, 0x2001), (0x2ff8, 0x3001)];
        assert_eq!(walk(&sregs, &[], 0), [(3, 0x1000)]);
        assert_eq!(
            walk(&sregs, &memory, 0xffff_f000),
            [(3, 0x1018), (2, 0x2ff8), (1, 0x3ff8)]
        );
    }

    #[test]
    fn without_pae_entries_have_four_bytes() {
        let mut sregs = sregs(CR0_PG, 0, 0);
        let gva = 0xffc0_1000;
        assert_eq!(
            walk(&sregs, &[(0x1ffc, 0xffff_ffff_0000_2083)], gva),
            [(2, 0x1ffc), (1, 0x2004)]
        );
        // Pages of 4 MiB have to be switched on.
        sregs.cr4 = CR4_PSE;
        assert_eq!(walk(&sregs, &[(0x1ffc, 0x2083)], gva), [(2, 0x1ffc)]);
    }
}
