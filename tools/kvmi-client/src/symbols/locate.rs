// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Where a live guest has the kernel of a file, and whether it has that kernel.

use std::{ops::Range, os::fd::AsFd};

use kvmi_abi::KvmiError;

use super::{
    exports::{disagreement, Export},
    memory::Memory,
    table::Table,
    Kernel, Symbols,
};
use crate::{
    connection::Connection,
    error::{Error, Result},
};

const MSR_LSTAR: u32 = 0xc000_0082;
/// EFER.LMA
const LONG_MODE: u64 = 1 << 10;

/// Where SYSCALL leads to.
const SYSCALL_ENTRY: &str = "entry_SYSCALL_64";
/// Where a page fault leads to, by the age of the kernel; with and without asynchronous page faults.
const FAULT_ENTRIES: [&str; 3] = ["asm_exc_page_fault", "async_page_fault", "page_fault"];
/// Offset of the page fault's gate in the IDT.
const FAULT_GATE: u64 = 14 * 16;

/// KASLR moves the kernel by multiples of this, below [`MAX_OFFSET`].
const ALIGN: u64 = 2 << 20;
const MAX_OFFSET: u64 = 1 << 30;

const BANNER: &[u8] = b"Linux version ";
const MAX_BANNER: usize = 512;

/// Why the kernel of a file was not found in a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocateError {
    /// The guest cannot be asked.
    #[error(transparent)]
    Connection(#[from] Error),
    /// The file lacks what is needed to know the kernel by.
    #[error(
        "the file has no symbol {0}, without which it cannot be compared with the guest; a \
         System.map has it, and so has /proc/kallsyms of a kernel with CONFIG_KALLSYMS_ALL"
    )]
    Incomplete(&'static str),
    /// No vCPU enters the kernel where the file says, moved by whatever KASLR could.
    #[error(
        "the file is of another kernel than the guest's: system calls and page faults lead to other \
         places (or the guest has not booted yet, is not Linux, or was tampered with)"
    )]
    Elsewhere,
    /// The kernel is mapped by none of the vCPUs.
    #[error(
        "none of the vCPUs has the guest's kernel mapped now, as it is with isolated page tables"
    )]
    NotMapped,
    /// What the guest has in place of the version banner is none.
    #[error("the file is of another kernel than the guest's: no version banner is where it says")]
    NoBanner,
    /// Something is not where the file says.
    #[error(
        "the file is of another build than the guest's kernel, where {symbol} is at {address:#x}; \
         that one is: {banner}"
    )]
    OtherBuild {
        /// The banner of the guest's kernel.
        banner: String,
        /// What is elsewhere.
        symbol: String,
        /// Where the guest has it.
        address: u64,
    },
}

impl Symbols {
    /// Finds the kernel in a live guest, through any of `vcpus`, and checks that it is the same
    /// build. The guest may run meanwhile.
    pub fn locate<S: AsFd>(
        self,
        vm: &mut Connection<S>,
        vcpus: &[u16],
    ) -> std::result::Result<Kernel, LocateError> {
        let mut table = self.0;
        let landmarks = Landmarks::of(&table)?;
        let mut failure = LocateError::Elsewhere;
        for offset in landmarks.offsets(vm, vcpus)? {
            match compare(&table, offset, landmarks.banner, vm, vcpus)? {
                Ok(banner) => {
                    if offset != 0 {
                        // Made when the kernel, and modules, were at other places.
                        table.drop_modules();
                    }
                    return Ok(Kernel {
                        table,
                        offset,
                        image: landmarks.image,
                        banner,
                    });
                }
                Err(difference) => failure = difference,
            }
        }
        Err(failure)
    }
}

/// Addresses of the file that the guest is compared by.
struct Landmarks {
    image: Range<u64>,
    banner: u64,
    /// Where system calls and page faults may lead to.
    syscall: Option<u64>,
    faults: [Option<u64>; 3],
}

impl Landmarks {
    fn of(table: &Table) -> std::result::Result<Self, LocateError> {
        let need = |name| {
            let found = table.kernel_symbol(name);
            found.ok_or(LocateError::Incomplete(name))
        };
        let start = match table.kernel_symbol("_text") {
            Some(start) => start,
            None => need("_stext")?,
        };
        Ok(Self {
            image: start..need("_end")?,
            banner: need("linux_banner")?,
            syscall: table.kernel_symbol(SYSCALL_ENTRY),
            faults: FAULT_ENTRIES.map(|name| table.kernel_symbol(name)),
        })
    }

    /// By how much the kernel may have been moved, judging by where vCPUs enter it.
    fn offsets<S: AsFd>(&self, vm: &mut Connection<S>, vcpus: &[u16]) -> Result<Vec<u64>> {
        let mut offsets = Vec::new();
        for vcpu in vcpus {
            let registers = match vm.get_registers(*vcpu, &[MSR_LSTAR]) {
                Ok(registers) if registers.sregs.efer & LONG_MODE != 0 => registers,
                // Not in the kernel yet, or not started at all.
                Ok(_) | Err(Error::Kvmi(KvmiError::Again, _)) => continue,
                Err(error) => return Err(error),
            };
            let syscall = registers.msrs.first().map(|(_, address)| *address);
            offsets.extend(moved(syscall, self.syscall));
            let gate = registers.sregs.idt.base.wrapping_add(FAULT_GATE);
            let fault = Memory::new(vm, *vcpu).gate(gate)?;
            offsets.extend(self.faults.iter().filter_map(|entry| moved(fault, *entry)));
        }
        offsets.sort_unstable();
        offsets.dedup();
        Ok(offsets)
    }
}

/// What must be added to an address of the file to get that of the guest, if KASLR can do that.
fn moved(guest: Option<u64>, file: Option<u64>) -> Option<u64> {
    let offset = guest?.wrapping_sub(file?);
    // The file may be of a kernel that was moved farther than this one.
    let distance = offset.min(offset.wrapping_neg());
    (distance % ALIGN == 0 && distance < MAX_OFFSET).then_some(offset)
}

/// Compares the guest with the file; returns its banner if it is the same kernel.
fn compare<S: AsFd>(
    table: &Table,
    offset: u64,
    banner: u64,
    vm: &mut Connection<S>,
    vcpus: &[u16],
) -> Result<std::result::Result<String, LocateError>> {
    for vcpu in vcpus {
        let mut memory = Memory::new(vm, *vcpu);
        let Some(text) = memory.bytes(banner.wrapping_add(offset), MAX_BANNER)? else {
            continue;
        };
        if !text.starts_with(BANNER) {
            return Ok(Err(LocateError::NoBanner));
        }
        let line = text.split(|byte| matches!(byte, 0 | b'\n')).next();
        let line = String::from_utf8_lossy(line.unwrap_or_default());
        let banner: String = line.chars().filter(|c| !c.is_control()).collect();
        return Ok(match disagreement(table, offset, &mut memory)? {
            None => Ok(banner),
            Some(Export { name, address }) => Err(LocateError::OtherBuild {
                banner,
                symbol: name,
                address,
            }),
        });
    }
    Ok(Err(LocateError::NotMapped))
}
