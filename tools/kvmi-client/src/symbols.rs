// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Names of what is in a Linux guest's kernel.
//!
//! [`Symbols`] are read from a `System.map`, or from a dump of the guest's `/proc/kallsyms`.
//! [`Symbols::locate`] then finds out where the live guest has that kernel, whatever KASLR did, and
//! checks that it really is that kernel: its version banner has to be where the file says, and so
//! has everything that the kernel itself knows to be exported to modules. A file of another build
//! is refused; it never gives wrong names.
//!
//! ```no_run
//! use kvmi_client::{attach::Attachment, symbols::Symbols};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (_attachment, mut vm) = Attachment::connect(4711)?;
//! let kernel = Symbols::load("System.map")?.locate(&mut vm, &[0])?;
//! let rip = vm.get_registers(0, &[])?.regs.rip;
//! match kernel.resolve(rip) {
//!     Some(place) => println!("{rip:#x} is {place}"),
//!     None => println!("{rip:#x} is not in the kernel"),
//! }
//! let text = kernel.range("_stext", "_etext")?;
//! println!("the kernel's code is {text:#x?}");
//! # Ok(())
//! # }
//! ```
//!
//! Limits: the guest is 64-bit Linux on x86. Symbols of modules are known only from a dump that was
//! made since the guest booted, and believed: modules that came or went since then are not noticed.
//! A guest that isolates page tables hides its kernel while it runs user space; another vCPU, or
//! another moment, helps.

mod exports;
mod locate;
mod memory;
mod parse;
mod table;

use std::{fmt, fs::File, io::BufReader, ops::Range, path::Path};

pub use locate::LocateError;
pub use parse::LoadError;
pub use table::LookupError;

use table::Table;

/// The symbols of a file, with the addresses that they have there.
#[derive(Clone, Debug)]
pub struct Symbols(Table);

impl Symbols {
    /// Reads a file: a `System.map`, or what `/proc/kallsyms` gives to root.
    pub fn load(file: impl AsRef<Path>) -> Result<Self, LoadError> {
        Self::parse(BufReader::new(File::open(file)?))
    }

    /// Reads what such a file contains; the order of the lines does not matter.
    pub fn parse(from: impl std::io::BufRead) -> Result<Self, LoadError> {
        parse::read(from).map(Self)
    }

    /// How many symbols there are.
    pub fn count(&self) -> usize {
        self.0.count()
    }
}

/// The symbols of the kernel that a guest runs, with the addresses that they have there.
#[derive(Debug)]
pub struct Kernel {
    table: Table,
    /// What has to be added to an address of the table.
    offset: u64,
    /// Where the kernel's image is in the table.
    image: Range<u64>,
    banner: String,
}

/// A place in the guest's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// The symbol that it belongs to.
    pub symbol: &'a str,
    /// How far it is behind the beginning of that, in bytes.
    pub offset: u64,
    /// Size of the symbol, if known: the distance to the next one.
    pub size: Option<u64>,
    /// The module that the symbol is in; none for the kernel proper.
    pub module: Option<&'a str>,
}

impl fmt::Display for Place<'_> {
    /// As the kernel prints it: `symbol+0x1a/0x40 [module]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}", self.symbol, self.offset)?;
        if let Some(size) = self.size {
            write!(f, "/{size:#x}")?;
        }
        match self.module {
            Some(module) => write!(f, " [{module}]"),
            None => Ok(()),
        }
    }
}

impl Kernel {
    /// What is at an address, be it code or data; nothing if it is not in the kernel's image, nor
    /// in a module.
    pub fn resolve(&self, address: u64) -> Option<Place<'_>> {
        self.table
            .resolve(address.wrapping_sub(self.offset), &self.image)
    }

    /// The address of a symbol. Of symbols with the same name, the kernel's own is preferred to
    /// those of modules, and a global one to local ones; `module:symbol` means that of a module.
    pub fn address(&self, symbol: &str) -> Result<u64, LookupError> {
        self.extent(symbol).map(|extent| extent.start)
    }

    /// The addresses from the beginning of a symbol, chosen as in [`Self::address`], to that of the
    /// next one. Empty if that is not known.
    pub fn extent(&self, symbol: &str) -> Result<Range<u64>, LookupError> {
        let found = self.table.extent(symbol, &self.image, self.offset)?;
        Ok(self.moved(found.start)..self.moved(found.end))
    }

    /// The addresses from one symbol up to another: `_stext` and `_etext` for the kernel's code,
    /// `__start_rodata` and `__end_rodata` for its constants.
    pub fn range(&self, first: &str, end: &str) -> Result<Range<u64>, LookupError> {
        let range = self.address(first)?..self.address(end)?;
        if range.start > range.end {
            return Err(LookupError::Backwards {
                first: first.to_owned(),
                end: end.to_owned(),
            });
        }
        Ok(range)
    }

    /// How far KASLR has moved the kernel from where the file has it, in two's complement.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The kernel's version banner, as the guest has it.
    pub fn banner(&self) -> &str {
        &self.banner
    }

    fn moved(&self, address: u64) -> u64 {
        address.wrapping_add(self.offset)
    }
}
