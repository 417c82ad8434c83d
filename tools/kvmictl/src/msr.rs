// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Names of MSRs.

use crate::number;

/// An MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msr(pub u32);

/// Those with a name here, without the prefixes that they have in manuals and in Linux.
const NAMES: [(&str, u32); 42] = [
    ("TSC", 0x10),
    ("APIC_BASE", 0x1b),
    ("FEATURE_CONTROL", 0x3a),
    ("TSC_ADJUST", 0x3b),
    ("SPEC_CTRL", 0x48),
    ("UCODE_REV", 0x8b),
    ("MTRR_CAP", 0xfe),
    ("ARCH_CAPABILITIES", 0x10a),
    ("SYSENTER_CS", 0x174),
    ("SYSENTER_ESP", 0x175),
    ("SYSENTER_EIP", 0x176),
    ("MCG_CAP", 0x179),
    ("MCG_STATUS", 0x17a),
    ("MISC_ENABLE", 0x1a0),
    ("XFD", 0x1c4),
    ("DEBUGCTL", 0x1d9),
    ("PAT", 0x277),
    ("MTRR_DEF_TYPE", 0x2ff),
    ("U_CET", 0x6a0),
    ("S_CET", 0x6a2),
    ("PL0_SSP", 0x6a4),
    ("PL1_SSP", 0x6a5),
    ("PL2_SSP", 0x6a6),
    ("PL3_SSP", 0x6a7),
    ("INT_SSP_TAB", 0x6a8),
    ("TSC_DEADLINE", 0x6e0),
    ("XSS", 0xda0),
    ("KVM_WALL_CLOCK_NEW", 0x4b56_4d00),
    ("KVM_SYSTEM_TIME_NEW", 0x4b56_4d01),
    ("KVM_ASYNC_PF_EN", 0x4b56_4d02),
    ("KVM_STEAL_TIME", 0x4b56_4d03),
    ("KVM_PV_EOI_EN", 0x4b56_4d04),
    ("EFER", 0xc000_0080),
    ("STAR", 0xc000_0081),
    ("LSTAR", 0xc000_0082),
    ("CSTAR", 0xc000_0083),
    ("SYSCALL_MASK", 0xc000_0084),
    ("FS_BASE", 0xc000_0100),
    ("GS_BASE", 0xc000_0101),
    ("KERNEL_GS_BASE", 0xc000_0102),
    ("TSC_AUX", 0xc000_0103),
    ("HWCR", 0xc001_0015),
];

/// Parses the name of an MSR, or its number.
pub fn parse(text: &str) -> Result<Msr, String> {
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return number::parse_u32(text).map(Msr);
    }
    let name = text.to_ascii_uppercase().replace('-', "_");
    let bare = ["MSR_IA32_", "IA32_", "MSR_K7_", "MSR_"]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .unwrap_or(&name);
    let known = NAMES.iter().find(|(known, _)| *known == bare);
    known.map(|(_, index)| Msr(*index)).ok_or_else(|| {
        let names: Vec<_> = NAMES.iter().map(|(name, _)| *name).collect();
        format!("expected a number or one of {}", names.join(", "))
    })
}

impl Msr {
    /// Its name, or its number if it has none here.
    pub fn name(self) -> String {
        match NAMES.iter().find(|(_, index)| *index == self.0) {
            Some((name, _)) => (*name).to_owned(),
            None => format!("{:#x}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_understood() {
        for text in ["LSTAR", "lstar", "MSR_LSTAR", "IA32_LSTAR", "0xc0000082"] {
            assert_eq!(parse(text), Ok(Msr(0xc000_0082)), "{text}");
        }
        assert_eq!(parse("msr-ia32-sysenter-cs"), Ok(Msr(0x174)));
        assert_eq!(parse("16"), Ok(Msr(16)));
        for bad in ["", "STARS", "-1", "0x100000000", "MSR_"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_name_is_that_of_one_msr() {
        for (at, (name, index)) in NAMES.iter().enumerate() {
            assert_eq!(parse(name), Ok(Msr(*index)));
            assert_eq!(Msr(*index).name(), *name);
            assert!(NAMES[..at].iter().all(|(_, before)| before < index));
        }
        assert_eq!(Msr(0x1234).name(), "0x1234");
    }
}
