// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What an event says, in words and as JSON.

use kvmi_client::{abi::guest_event::DescriptorRegister, VcpuEvent, VcpuEventKind};
use serde_json::{json, Value};

use crate::{
    bits::Bits,
    msr::Msr,
    output::{gpa, hex},
};

/// Something that the guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Happening {
    /// What it is counted as: the name of a register, or of an instruction.
    pub what: String,
    detail: Detail,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Detail {
    /// A register is written.
    Write {
        event: &'static str,
        old: u64,
        new: u64,
        bits: Option<Bits>,
    },
    /// A register is loaded or stored, which the name of the instruction says.
    Descriptor,
    /// The arguments that the guest may use as it likes, with the names of their registers.
    Hypercall([(&'static str, u64); 4]),
    Breakpoint {
        gpa: Option<u64>,
        insn_len: u8,
    },
}

impl Happening {
    /// What an event says; nothing if it is none of those that a guest makes by itself.
    pub fn of(event: &VcpuEvent) -> Option<Self> {
        let write = |what: String, event, old, new, bits| Self {
            what,
            detail: Detail::Write {
                event,
                old,
                new,
                bits,
            },
        };
        Some(match event.kind {
            VcpuEventKind::Cr { cr, old, new } => {
                let what = format!("CR{}", cr.number());
                write(what, "CR", old, new, Bits::of_cr(cr))
            }
            VcpuEventKind::Msr { msr, old, new } => {
                write(Msr(msr).name(), "MSR", old, new, Bits::of_msr(msr))
            }
            VcpuEventKind::Xsetbv { xcr, old, new } => {
                let bits = (xcr == 0).then_some(Bits::XCR0);
                write(format!("XCR{xcr}"), "XSETBV", old, new, bits)
            }
            VcpuEventKind::Descriptor { register, write } => Self {
                what: mnemonic(register, write).to_owned(),
                detail: Detail::Descriptor,
            },
            VcpuEventKind::Hypercall => Self {
                what: "HYPERCALL".to_owned(),
                detail: Detail::Hypercall(arguments(event)),
            },
            VcpuEventKind::Breakpoint { gpa, insn_len } => Self {
                what: "BREAKPOINT".to_owned(),
                detail: Detail::Breakpoint { gpa, insn_len },
            },
            _ => return None,
        })
    }

    /// What is written, if something is.
    pub fn value(&self) -> Option<u64> {
        match self.detail {
            Detail::Write { new, .. } => Some(new),
            _ => None,
        }
    }

    /// It for people.
    pub fn text(&self) -> String {
        let rest = match &self.detail {
            Detail::Write { old, new, bits, .. } => {
                let mut text = format!(" {old:#x} -> {new:#x}");
                for (sign, bits) in [
                    ('+', named(*bits, new & !old)),
                    ('-', named(*bits, old & !new)),
                ] {
                    for bit in bits {
                        text += &format!(" {sign}{bit}");
                    }
                }
                text
            }
            Detail::Descriptor => String::new(),
            Detail::Hypercall(arguments) => arguments
                .iter()
                .map(|(name, value)| format!(" {name}={value:#x}"))
                .collect(),
            Detail::Breakpoint { gpa: at, insn_len } => {
                let at = at.map_or_else(|| "unknown".to_owned(), gpa);
                format!(" gpa {at}, {insn_len} bytes")
            }
        };
        self.what.clone() + &rest
    }

    /// It for programs.
    pub fn json(&self) -> Value {
        match &self.detail {
            Detail::Write {
                event,
                old,
                new,
                bits,
            } => json!({
                "event": event,
                "register": self.what,
                "old": hex(*old),
                "new": hex(*new),
                "set": named(*bits, new & !old),
                "cleared": named(*bits, old & !new),
            }),
            Detail::Descriptor => json!({
                "event": "DESCRIPTOR",
                "instruction": self.what,
            }),
            Detail::Hypercall(arguments) => {
                let mut value = json!({ "event": "HYPERCALL" });
                for (name, argument) in arguments {
                    value[*name] = hex(*argument).into();
                }
                value
            }
            Detail::Breakpoint { gpa: at, insn_len } => json!({
                "event": "BREAKPOINT",
                "gpa": at.map(gpa),
                "bytes": insn_len,
            }),
        }
    }
}

fn named(bits: Option<Bits>, value: u64) -> Vec<String> {
    bits.map_or_else(Vec::new, |bits| bits.names(value))
}

fn mnemonic(register: DescriptorRegister, write: bool) -> &'static str {
    match (register, write) {
        (DescriptorRegister::Idtr, true) => "LIDT",
        (DescriptorRegister::Idtr, false) => "SIDT",
        (DescriptorRegister::Gdtr, true) => "LGDT",
        (DescriptorRegister::Gdtr, false) => "SGDT",
        (DescriptorRegister::Ldtr, true) => "LLDT",
        (DescriptorRegister::Ldtr, false) => "SLDT",
        (DescriptorRegister::Tr, true) => "LTR",
        (DescriptorRegister::Tr, false) => "STR",
    }
}

/// The arguments that the hypercall leaves to guest and tool.
fn arguments(event: &VcpuEvent) -> [(&'static str, u64); 4] {
    let regs = &event.arch.regs;
    if event.arch.mode == 8 {
        return [
            ("rdx", regs.rdx),
            ("r10", regs.r10),
            ("r8", regs.r8),
            ("r9", regs.r9),
        ];
    }
    let low = |value| value & 0xffff_ffff;
    [
        ("edx", low(regs.rdx)),
        ("esi", low(regs.rsi)),
        ("edi", low(regs.rdi)),
        ("ebp", low(regs.rbp)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::tests::event;
    use kvmi_client::abi::guest_event::Cr;

    fn happening(kind: VcpuEventKind) -> Happening {
        Happening::of(&event(kind)).unwrap()
    }

    #[test]
    fn writes_tell_which_bits_change() {
        let cr4 = happening(VcpuEventKind::Cr {
            cr: Cr::Cr4,
            old: 0x30_0020,
            new: 0xa0,
        });
        assert_eq!(cr4.text(), "CR4 0x300020 -> 0xa0 +PGE -SMEP -SMAP");
        let json = cr4.json();
        assert_eq!(
            (&json["event"], &json["register"]),
            (&json!("CR"), &json!("CR4"))
        );
        assert_eq!(
            (&json["old"], &json["new"]),
            (&json!("0x300020"), &json!("0xa0"))
        );
        assert_eq!(json["set"], json!(["PGE"]));
        assert_eq!(json["cleared"], json!(["SMEP", "SMAP"]));
        assert_eq!(cr4.value(), Some(0xa0));

        let (old, new) = (1, 7);
        let xcr0 = happening(VcpuEventKind::Xsetbv { xcr: 0, old, new });
        assert_eq!(xcr0.text(), "XCR0 0x1 -> 0x7 +SSE +AVX");
        let cr = Cr::Cr3;
        let cr3 = happening(VcpuEventKind::Cr { cr, old, new });
        assert_eq!(cr3.text(), "CR3 0x1 -> 0x7");
    }

    #[test]
    fn msrs_have_names() {
        let msr = |msr| {
            happening(VcpuEventKind::Msr {
                msr,
                old: 0,
                new: 0x501,
            })
        };
        assert_eq!(msr(0xc000_0080).text(), "EFER 0x0 -> 0x501 +SCE +LME +LMA");
        assert_eq!(msr(0xc000_0082).text(), "LSTAR 0x0 -> 0x501");
        assert_eq!(msr(0x1234).what, "0x1234");
    }

    #[test]
    fn instructions_are_told_with_their_arguments() {
        let mut called = event(VcpuEventKind::Hypercall);
        let text = |event: &VcpuEvent| Happening::of(event).unwrap().text();
        assert_eq!(
            text(&called),
            "HYPERCALL rdx=0x100000002 r10=0x0 r8=0x0 r9=0x0"
        );
        called.arch.mode = 4;
        assert_eq!(text(&called), "HYPERCALL edx=0x2 esi=0x0 edi=0x0 ebp=0x0");
        assert_eq!(Happening::of(&called).unwrap().json()["edx"], "0x2");

        for (gpa, expected) in [(Some(0x5008), "gpa 0x5008"), (None, "gpa unknown")] {
            let hit = happening(VcpuEventKind::Breakpoint { gpa, insn_len: 1 });
            assert_eq!(hit.text(), format!("BREAKPOINT {expected}, 1 bytes"));
            assert_eq!(hit.value(), None);
        }
        let names = DescriptorRegister::ALL.map(|register| {
            [true, false].map(|write| {
                let access = happening(VcpuEventKind::Descriptor { register, write });
                assert_eq!(access.json()["instruction"], access.what);
                access.text()
            })
        });
        assert_eq!(
            names.concat(),
            ["LIDT", "SIDT", "LGDT", "SGDT", "LLDT", "SLDT", "LTR", "STR"]
        );
    }

    #[test]
    fn other_events_are_none_of_the_guests_doings() {
        assert_eq!(Happening::of(&event(VcpuEventKind::Pause)), None);
    }
}
