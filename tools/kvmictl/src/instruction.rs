// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The instruction that a vCPU is about to execute.

use std::{ops::Range, os::fd::AsFd};

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Formatter as _, InstructionInfo, InstructionInfoFactory,
    IntelFormatter, OpAccess, Register, UsedMemory,
};
use kvmi_client::{
    abi::arch::{Regs, VcpuEventArch},
    pages, Access, Connection, Error, Result, VcpuEvent, PAGE_SIZE,
};

/// Bytes that the longest instruction has.
const LONGEST: u64 = 15;

/// An instruction, and the state in which it is executed.
pub struct Instruction<'a> {
    bytes: Vec<u8>,
    code: iced_x86::Instruction,
    info: InstructionInfo,
    arch: &'a VcpuEventArch,
}

impl<'a> Instruction<'a> {
    /// Reads the instruction of a vCPU that waits for the reply to an event; nothing if it cannot be
    /// read, or is none.
    pub fn of<S: AsFd>(vm: &mut Connection<S>, event: &'a VcpuEvent) -> Result<Option<Self>> {
        let mut bytes = Vec::new();
        // The page that it begins in, and the next one if it goes on there.
        for piece in pages(linear(&event.arch), LONGEST)? {
            let mut part = vec![0; piece.len];
            match vm.read_virtual(event.vcpu, piece.gpa, &mut part) {
                Ok(()) => bytes.extend(part),
                Err(Error::Unmapped(_) | Error::Kvmi(..)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(Self::decode(&bytes, &event.arch))
    }

    fn decode(bytes: &[u8], arch: &'a VcpuEventArch) -> Option<Self> {
        let bits = match arch.mode {
            8 => 64,
            4 => 32,
            2 => 16,
            _ => return None,
        };
        let rip = arch.regs.rip;
        let code = Decoder::with_ip(bits, bytes, rip, DecoderOptions::NONE).decode();
        let info = InstructionInfoFactory::new().info(&code).clone();
        let bytes = bytes.get(..code.len())?.to_vec();
        (!code.is_invalid()).then_some(Self {
            bytes,
            code,
            info,
            arch,
        })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// It in the notation of Intel's manuals.
    pub fn text(&self) -> String {
        let mut formatter = IntelFormatter::new();
        let options = formatter.options_mut();
        options.set_hex_prefix("0x");
        options.set_hex_suffix("");
        options.set_uppercase_hex(false);
        options.set_branch_leading_zeros(false);
        options.set_rip_relative_addresses(true);
        options.set_space_after_operand_separator(true);
        let mut text = String::new();
        formatter.format(&self.code, &mut text);
        text
    }

    /// The virtual address that it names: where it jumps to, or what it accesses.
    pub fn target(&self) -> Option<u64> {
        if self.code.is_ip_rel_memory_operand() {
            return Some(self.code.ip_rel_memory_address());
        }
        let target = self.code.near_branch_target();
        (target != 0).then_some(target)
    }

    /// Where its bytes are.
    fn code(&self) -> Range<u64> {
        let start = linear(self.arch);
        start..start.saturating_add(self.len())
    }

    /// How many bytes it has.
    fn len(&self) -> u64 {
        // At most 15.
        u64::try_from(self.code.len()).unwrap_or(LONGEST)
    }

    /// How many bytes it accesses from an address on, if that is known; of the address, only the part
    /// counts that translation leaves alone. It must be the first one in its page.
    pub fn reach(&self, address: u64, access: Access) -> Option<u64> {
        let operands = self.info.used_memory().iter();
        let operands = operands.filter_map(|operand| self.operand(operand, access));
        let code = access.contains(Access::X).then(|| self.code());
        let reach = |bytes: Range<u64>| {
            let distance = address.wrapping_sub(bytes.start) % PAGE_SIZE;
            let begins_page = address % PAGE_SIZE == 0;
            let left = (bytes.end - bytes.start).checked_sub(distance)?;
            (left > 0 && (distance == 0 || begins_page)).then_some(left)
        };
        code.into_iter().chain(operands).filter_map(reach).max()
    }

    /// Where an operand is, if it is accessed like that.
    fn operand(&self, operand: &UsedMemory, access: Access) -> Option<Range<u64>> {
        let (reads, writes) = match operand.access() {
            OpAccess::Read | OpAccess::CondRead => (true, false),
            OpAccess::Write | OpAccess::CondWrite => (false, true),
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
            _ => return None,
        };
        let fits = reads && access.contains(Access::R) || writes && access.contains(Access::W);
        let size = u64::try_from(operand.memory_size().size()).ok()?;
        if !fits || size == 0 {
            return None;
        }
        let start = operand.virtual_address(0, |register, _, _| self.register(register))?;
        Some(start..start.checked_add(size)?)
    }

    /// The value of a register, or the base of a segment, as it counts for an address.
    fn register(&self, register: Register) -> Option<u64> {
        let sregs = &self.arch.sregs;
        let flat = self.arch.mode == 8;
        Some(match register {
            Register::FS => sregs.fs.base,
            Register::GS => sregs.gs.base,
            Register::CS | Register::DS | Register::ES | Register::SS if flat => 0,
            Register::CS => sregs.cs.base,
            Register::DS => sregs.ds.base,
            Register::ES => sregs.es.base,
            Register::SS => sregs.ss.base,
            _ => general(&self.arch.regs, register)?,
        })
    }

    /// Whether it does nothing but to write to memory, once: without it, nothing else is missing.
    fn only_stores(&self) -> bool {
        let is_read = |access| {
            matches!(
                access,
                OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            )
        };
        let mut registers = self.info.used_registers().iter();
        let stores = matches!(self.info.used_memory(), [one] if one.access() == OpAccess::Write);
        stores
            && registers.all(|register| is_read(register.access()))
            && self.code.rflags_modified() == 0
            && self.code.flow_control() == FlowControl::Next
            && !self.code.has_rep_prefix()
            && !self.code.has_repne_prefix()
    }

    /// The registers behind it, if leaving it out means that memory is not written and nothing else.
    pub fn skipped(&self) -> Option<Regs> {
        let mut regs = self.arch.regs;
        regs.rip = self.code.next_ip();
        self.only_stores().then_some(regs)
    }
}

/// Where the next instruction of a vCPU is.
fn linear(arch: &VcpuEventArch) -> u64 {
    match arch.mode {
        8 => arch.regs.rip,
        _ => arch.sregs.cs.base.wrapping_add(arch.regs.rip),
    }
}

/// A general register, or the lower part of one.
fn general(regs: &Regs, register: Register) -> Option<u64> {
    let full = match register.full_register() {
        Register::RAX => regs.rax,
        Register::RBX => regs.rbx,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::RSP => regs.rsp,
        Register::RBP => regs.rbp,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        _ => return None,
    };
    Some(match register.size() {
        8 => full,
        4 => full & 0xffff_ffff,
        2 => full & 0xffff,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arch(mode: u8) -> VcpuEventArch {
        let mut arch = VcpuEventArch {
            mode,
            ..Default::default()
        };
        arch.regs = Regs {
            rip: 0x1000,
            rdi: 0x2000,
            rsp: 0x7010,
            ..Default::default()
        };
        arch.sregs.gs.base = 0x1_0000;
        arch
    }

    #[test]
    fn pure_stores_can_be_left_out() {
        let arch = arch(8);
        for (name, bytes, len) in [
            ("mov [rdi], al", &[0x88, 0x07][..], Some(2)),
            (
                "mov qword [rdi], 1",
                &[0x48, 0xc7, 0x07, 1, 0, 0, 0],
                Some(7),
            ),
            ("movups [rdi], xmm0", &[0x0f, 0x11, 0x07], Some(3)),
            ("vmovdqu [rdi], ymm0", &[0xc5, 0xfe, 0x7f, 0x07], Some(4)),
            ("stosb", &[0xaa], None),
            ("rep stosb", &[0xf3, 0xaa], None),
            ("push rax", &[0x50], None),
            ("call", &[0xe8, 0, 0, 0, 0], None),
            ("inc [rdi]", &[0xfe, 0x07], None),
            ("xchg [rdi], al", &[0x86, 0x07], None),
            ("mov al, [rdi]", &[0x8a, 0x07], None),
            ("nop", &[0x90], None),
        ] {
            let instruction = Instruction::decode(bytes, &arch).unwrap();
            let rip = instruction.skipped().map(|regs| regs.rip - 0x1000);
            assert_eq!(rip, len, "{name}");
        }
        assert!(Instruction::decode(&[0x48], &arch).is_none());
        assert!(Instruction::decode(&[], &arch).is_none());
    }

    #[test]
    fn instructions_are_printed_with_what_they_name() {
        let arch = arch(8);
        for (bytes, text, target) in [
            (&[0x55][..], "push rbp", None),
            (&[0x48, 0x89, 0x47, 0x10], "mov [rdi+0x10], rax", None),
            (&[0xe8, 0xfb, 0x0f, 0, 0], "call 0x2000", Some(0x2000)),
            (&[0xeb, 0xfe], "jmp short 0x1000", Some(0x1000)),
            (
                &[0x48, 0x8b, 0x05, 0xf9, 0x1f, 0, 0],
                "mov rax, [rip+0x1ff9]",
                Some(0x3000),
            ),
        ] {
            let longer = [bytes, &[0x90; 4]].concat();
            let instruction = Instruction::decode(&longer, &arch).unwrap();
            assert_eq!((instruction.bytes(), instruction.target()), (bytes, target));
            assert_eq!(instruction.text(), text);
        }
    }

    #[test]
    fn reach_is_that_of_the_operand() {
        let (r, w, x) = (Access::R, Access::W, Access::X);
        let mut arch = arch(8);
        let store = &[0x48, 0x89, 0x07][..]; // mov [rdi], rax
        for (name, rdi, bytes, address, access, reach) in [
            ("store", 0x2000, store, 0x9_9000, w, Some(8)),
            ("first page", 0x2ffb, store, 0x9_9ffb, w, Some(8)),
            ("next page", 0x2ffb, store, 0x9_9000, w, Some(3)),
            ("inside of it", 0x2000, store, 0x9_9004, w, None),
            ("behind it", 0x2ff8, store, 0x9_9000, w, None),
            ("before it", 0x2008, store, 0x9_9000, w, None),
            ("not read", 0x2000, store, 0x9_9000, r, None),
            ("code", 0x2000, store, 0x5000, x, Some(3)),
            ("inc byte [rdi]", 0x2001, &[0xfe, 0x07], 0x1, w, Some(1)),
            ("push rax", 0x2000, &[0x50], 0x8, w, Some(8)),
            (
                "mov [gs:8], eax",
                0,
                &[0x65, 0x89, 0x04, 0x25, 8, 0, 0, 0],
                8,
                w,
                Some(4),
            ),
            (
                "mov [edi], ax",
                1 << 32 | 0x2004,
                &[0x67, 0x66, 0x89, 0x07],
                4,
                w,
                Some(2),
            ),
            (
                "fxsave [rdi]",
                0x2e00,
                &[0x0f, 0xae, 0x07],
                0xe00,
                w,
                Some(512),
            ),
        ] {
            arch.regs.rdi = rdi;
            let instruction = Instruction::decode(bytes, &arch).unwrap();
            assert_eq!(instruction.reach(address, access), reach, "{name}");
        }
    }

    #[test]
    fn segments_count_outside_of_64_bit_code() {
        let mut arch = arch(2);
        arch.sregs.cs.base = 0xf_0000;
        arch.sregs.ds.base = 0x5_0000;
        let store = Instruction::decode(&[0x88, 0x05], &arch).unwrap(); // mov [di], al
        assert_eq!(store.reach(0x5_2000, Access::W), Some(1));
        assert_eq!(store.reach(0xf_1000, Access::X), Some(2));
        assert_eq!(store.skipped().map(|regs| regs.rip), Some(0x1002));
    }
}
