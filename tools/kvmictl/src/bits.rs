// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Names of the bits of control registers (Intel SDM volume 3 chapter 2, AMD APM volume 2 chapter 3).

use kvmi_client::abi::guest_event::Cr;

/// Bits and their names, in the order of the bits.
type Names = &'static [(u8, &'static str)];

const CR0: Names = &[
    (0, "PE"),
    (1, "MP"),
    (2, "EM"),
    (3, "TS"),
    (4, "ET"),
    (5, "NE"),
    (16, "WP"),
    (18, "AM"),
    (29, "NW"),
    (30, "CD"),
    (31, "PG"),
];

const CR4: Names = &[
    (0, "VME"),
    (1, "PVI"),
    (2, "TSD"),
    (3, "DE"),
    (4, "PSE"),
    (5, "PAE"),
    (6, "MCE"),
    (7, "PGE"),
    (8, "PCE"),
    (9, "OSFXSR"),
    (10, "OSXMMEXCPT"),
    (11, "UMIP"),
    (12, "LA57"),
    (13, "VMXE"),
    (14, "SMXE"),
    (16, "FSGSBASE"),
    (17, "PCIDE"),
    (18, "OSXSAVE"),
    (19, "KL"),
    (20, "SMEP"),
    (21, "SMAP"),
    (22, "PKE"),
    (23, "CET"),
    (24, "PKS"),
    (25, "UINTR"),
    (28, "LAM_SUP"),
    (32, "FRED"),
];

const EFER: Names = &[
    (0, "SCE"),
    (8, "LME"),
    (10, "LMA"),
    (11, "NXE"),
    (12, "SVME"),
    (13, "LMSLE"),
    (14, "FFXSR"),
    (15, "TCE"),
    (17, "MCOMMIT"),
    (18, "INTWB"),
    (20, "UAIE"),
    (21, "AUTOIBRS"),
];

const XCR0: Names = &[
    (0, "X87"),
    (1, "SSE"),
    (2, "AVX"),
    (3, "BNDREGS"),
    (4, "BNDCSR"),
    (5, "OPMASK"),
    (6, "ZMM_HI256"),
    (7, "HI16_ZMM"),
    (9, "PKRU"),
    (17, "XTILECFG"),
    (18, "XTILEDATA"),
];

/// A register of which bits have names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bits(Names);

impl Bits {
    /// Those of XCR0.
    pub const XCR0: Self = Self(XCR0);

    /// Those of a control register; CR3 has an address instead.
    pub fn of_cr(cr: Cr) -> Option<Self> {
        match cr {
            Cr::Cr0 => Some(Self(CR0)),
            Cr::Cr3 => None,
            Cr::Cr4 => Some(Self(CR4)),
        }
    }

    /// Those of an MSR.
    pub fn of_msr(msr: u32) -> Option<Self> {
        (msr == 0xc000_0080).then_some(Self(EFER))
    }

    /// The names of bits, in their order; of bits without one, the number.
    pub fn names(self, bits: u64) -> Vec<String> {
        let is_set = |bit: &u8| bits >> bit & 1 != 0;
        let name = |bit| match self.0.iter().find(|(known, _)| *known == bit) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("bit{bit}"),
        };
        (0..64).filter(is_set).map(name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_have_the_names_of_their_register() {
        let cr0 = Bits::of_cr(Cr::Cr0).unwrap();
        assert_eq!(cr0.names(0x8001_0001), ["PE", "WP", "PG"]);
        let cr4 = Bits::of_cr(Cr::Cr4).unwrap();
        assert_eq!(cr4.names(0x0030_0020), ["PAE", "SMEP", "SMAP"]);
        let efer = Bits::of_msr(0xc000_0080).unwrap();
        assert_eq!(efer.names(0xd01), ["SCE", "LME", "LMA", "NXE"]);
        assert_eq!(Bits::XCR0.names(7), ["X87", "SSE", "AVX"]);
        assert_eq!(Bits::XCR0.names(1 << 8 | 1 << 63), ["bit8", "bit63"]);
        assert!(Bits::of_cr(Cr::Cr3).is_none() && Bits::of_msr(0xc000_0082).is_none());
    }

    #[test]
    fn every_bit_is_named_once_and_in_order() {
        for names in [CR0, CR4, EFER, XCR0] {
            assert!(names.windows(2).all(|pair| pair[0].0 < pair[1].0));
            assert!(names.iter().all(|(bit, _)| *bit < 64));
        }
    }
}
