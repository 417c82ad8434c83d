// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Registers by their names, and how they are printed.

use kvmi_client::abi::arch::{DescriptorTable, Regs, Segment, Sregs};
use serde_json::{json, Value};

use crate::output::hex;

/// Registers on a line.
const COLUMNS: usize = 3;

/// Names and values, several on a line.
pub fn columns(registers: &[(&str, u64)]) -> Vec<String> {
    registers
        .chunks(COLUMNS)
        .map(|line| {
            let line: Vec<_> = line
                .iter()
                .map(|(name, value)| format!("{name:<8}{value:016x}"))
                .collect();
            line.join("  ")
        })
        .collect()
}

/// General registers, and their names.
pub fn general(r: &Regs) -> [(&'static str, u64); 18] {
    [
        ("rax", r.rax),
        ("rbx", r.rbx),
        ("rcx", r.rcx),
        ("rdx", r.rdx),
        ("rsi", r.rsi),
        ("rdi", r.rdi),
        ("rsp", r.rsp),
        ("rbp", r.rbp),
        ("r8", r.r8),
        ("r9", r.r9),
        ("r10", r.r10),
        ("r11", r.r11),
        ("r12", r.r12),
        ("r13", r.r13),
        ("r14", r.r14),
        ("r15", r.r15),
        ("rip", r.rip),
        ("rflags", r.rflags),
    ]
}

/// Control registers, and what goes with them.
pub fn control(s: &Sregs) -> [(&'static str, u64); 7] {
    [
        ("cr0", s.cr0),
        ("cr2", s.cr2),
        ("cr3", s.cr3),
        ("cr4", s.cr4),
        ("cr8", s.cr8),
        ("efer", s.efer),
        ("apic", s.apic_base),
    ]
}

/// Segment registers.
pub fn segments(s: &Sregs) -> [(&'static str, Segment); 8] {
    [
        ("cs", s.cs),
        ("ds", s.ds),
        ("es", s.es),
        ("fs", s.fs),
        ("gs", s.gs),
        ("ss", s.ss),
        ("tr", s.tr),
        ("ldt", s.ldt),
    ]
}

/// Tables of descriptors.
pub fn tables(s: &Sregs) -> [(&'static str, DescriptorTable); 2] {
    [("gdt", s.gdt), ("idt", s.idt)]
}

/// A segment as JSON.
pub fn segment_json((name, s): (&'static str, Segment)) -> (&'static str, Value) {
    let value = json!({
        "selector": hex(s.selector),
        "base": hex(s.base),
        "limit": hex(s.limit),
        "type": s.type_,
        "dpl": s.dpl,
        "present": s.present != 0,
        "system": s.s == 0,
        "long": s.l != 0,
        "db": s.db != 0,
        "granularity": s.g != 0,
        "avl": s.avl != 0,
        "unusable": s.unusable != 0,
    });
    (name, value)
}

/// A segment for people.
pub fn segment_line((name, s): (&'static str, Segment)) -> String {
    let Segment {
        selector,
        base,
        limit,
        type_,
        dpl,
        ..
    } = s;
    let flags: Vec<_> = [
        (s.present, "P"),
        (s.s, "S"),
        (s.l, "L"),
        (s.db, "DB"),
        (s.g, "G"),
        (s.avl, "AVL"),
        (s.unusable, "unusable"),
    ]
    .iter()
    .filter(|(set, _)| *set != 0)
    .map(|(_, name)| *name)
    .collect();
    let flags = flags.join(" ");
    let line = format!(
        "{name:<8}{selector:04x} base {base:016x}  limit {limit:08x}  type {type_:x}  dpl {dpl}  {flags}"
    );
    line.trim_end().to_owned()
}
