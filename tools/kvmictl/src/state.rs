// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the registers say about the state of a vCPU.

use kvmi_client::abi::arch::{Regs, Sregs};

/// CR0.PE
const PROTECTED: u64 = 1;
/// RFLAGS.VM
const VIRTUAL_8086: u64 = 1 << 17;

/// Privilege level of the code being run.
pub fn cpl(regs: &Regs, sregs: &Sregs) -> u8 {
    if sregs.cr0 & PROTECTED == 0 {
        return 0;
    }
    if regs.rflags & VIRTUAL_8086 != 0 {
        return 3;
    }
    // That of CS may be another: of conforming code.
    sregs.ss.dpl & 3
}

/// Kind of the code being run, from its operand size.
pub fn mode(mode: u32) -> &'static str {
    match mode {
        2 => "16-bit",
        4 => "32-bit",
        8 => "64-bit",
        _ => "unknown",
    }
}

/// Names of RFLAGS' bits.
const FLAGS: [(u64, &str); 16] = [
    (1 << 0, "CF"),
    (1 << 2, "PF"),
    (1 << 4, "AF"),
    (1 << 6, "ZF"),
    (1 << 7, "SF"),
    (1 << 8, "TF"),
    (1 << 9, "IF"),
    (1 << 10, "DF"),
    (1 << 11, "OF"),
    (1 << 14, "NT"),
    (1 << 16, "RF"),
    (VIRTUAL_8086, "VM"),
    (1 << 18, "AC"),
    (1 << 19, "VIF"),
    (1 << 20, "VIP"),
    (1 << 21, "ID"),
];

/// RFLAGS for people: the names of the bits that are set, and the I/O privilege level.
pub fn flags(rflags: u64) -> String {
    let mut names: Vec<_> = FLAGS
        .iter()
        .filter(|(bit, _)| rflags & bit != 0)
        .map(|(_, name)| (*name).to_owned())
        .collect();
    let iopl = rflags >> 12 & 3;
    if iopl != 0 {
        names.push(format!("IOPL={iopl}"));
    }
    names.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privilege_depends_on_the_mode() {
        let mut regs = Regs::default();
        let mut sregs = Sregs::default();
        sregs.ss.dpl = 3;
        assert_eq!(cpl(&regs, &sregs), 0);
        sregs.cr0 = 0x8000_0001;
        assert_eq!(cpl(&regs, &sregs), 3);
        sregs.ss.dpl = 0;
        assert_eq!(cpl(&regs, &sregs), 0);
        regs.rflags = VIRTUAL_8086;
        assert_eq!(cpl(&regs, &sregs), 3);
    }

    #[test]
    fn modes_and_flags_have_names() {
        assert_eq!(mode(8), "64-bit");
        assert_eq!(mode(u32::MAX), "unknown");
        assert_eq!(flags(0x3246), "PF ZF IF IOPL=3");
        assert_eq!(flags(2), "");
    }
}
