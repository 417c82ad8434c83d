// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Names of places in the guest's kernel.

use std::{ops::Range, os::fd::AsFd};

use anyhow::{Context as _, Result};
use kvmi_client::{
    symbols::{Kernel, LookupError, Place, Symbols},
    Connection, Paused,
};
use serde::Serialize;

use crate::{
    cli::SymbolFile,
    output::{hex, plain},
};

/// The names that are known: none unless there was a file.
#[derive(Debug)]
pub struct Names(Option<Kernel>);

/// A place, as it is printed as JSON.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Printed {
    symbol: String,
    offset: String,
    size: Option<String>,
    module: Option<String>,
}

impl Names {
    /// Reads the file of the command line, if there is one. To be done before a VM is paused.
    pub fn load(file: &SymbolFile) -> Result<Option<Symbols>> {
        // An environment variable may be there and empty.
        let given = file.file.as_deref();
        let Some(file) = given.filter(|file| !file.as_os_str().is_empty()) else {
            return Ok(None);
        };
        let symbols = Symbols::load(file);
        symbols.map(Some).with_context(|| {
            let file = file.to_string_lossy();
            format!("cannot use the symbols in {}", plain(&file))
        })
    }

    /// Finds out where a guest has what was read.
    pub fn locate<S: AsFd>(
        symbols: Option<Symbols>,
        vm: &mut Connection<S>,
        vcpus: &[u16],
    ) -> Result<Self> {
        let kernel = symbols.map(|symbols| symbols.locate(vm, vcpus));
        Ok(Self(kernel.transpose()?))
    }

    /// As [`Self::locate`], through the vCPUs that are paused.
    pub fn locate_paused<S: AsFd>(
        symbols: Option<Symbols>,
        paused: &mut Paused<'_, S>,
    ) -> Result<Self> {
        let vcpus: Vec<u16> = paused.vcpus().iter().map(|event| event.vcpu).collect();
        Self::locate(symbols, paused, &vcpus)
    }

    /// No names.
    pub fn none() -> Self {
        Self(None)
    }

    /// What is at an address, if it is known to be in the kernel.
    fn place(&self, address: u64) -> Option<Place<'_>> {
        self.0.as_ref()?.resolve(address)
    }

    /// What is at an address, for people.
    pub fn text(&self, address: u64) -> Option<String> {
        self.place(address).map(|place| plain(&place.to_string()))
    }

    /// What is at an address, as JSON.
    pub fn json(&self, address: u64) -> Option<Printed> {
        let place = self.place(address)?;
        Some(Printed {
            symbol: place.symbol.to_owned(),
            offset: hex(place.offset),
            size: place.size.map(hex),
            module: place.module.map(str::to_owned),
        })
    }

    /// Whether there is a file with names.
    pub fn are_known(&self) -> bool {
        self.0.is_some()
    }

    /// Size of a symbol: the distance to the next one, or 1 if there is none.
    pub fn size(&self, name: &str) -> Result<u64, LookupError> {
        let extent = self.kernel(name)?.extent(name)?;
        Ok(extent.end.saturating_sub(extent.start).max(1))
    }

    /// The addresses from one symbol up to another.
    pub fn range(&self, first: &str, end: &str) -> Result<Range<u64>, LookupError> {
        self.kernel(first)?.range(first, end)
    }

    /// The kernel in which to look for a symbol.
    fn kernel(&self, name: &str) -> Result<&Kernel, LookupError> {
        let unknown = || LookupError::Unknown(name.to_owned());
        self.0.as_ref().ok_or_else(unknown)
    }

    /// The address of a symbol.
    pub fn address(&self, name: &str) -> Result<u64, LookupError> {
        self.kernel(name)?.address(name)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::memory::tests::with_script;
    use kvmi_client::{
        abi::wire::{Header, ReplyHead},
        symbols::LoadError,
        Command,
    };
    use std::{io::Write as _, path::PathBuf};

    const MAP: &str = "ffffffff81000000 T _text\n\
        ffffffff81000000 T _stext\n\
        ffffffff81000040 T entry_SYSCALL_64\n\
        ffffffff81000100 T schedule\n\
        ffffffff81000200 D linux_banner\n\
        ffffffff81001000 B _end\n";

    /// Uses the names of a kernel that KASLR has moved by 2 MiB.
    pub fn with_names(test: impl FnOnce(&Names)) {
        let mut registers = vec![0; 488];
        registers[0] = 8;
        registers[464] = 1; // MSRs
        registers[416..418].copy_from_slice(&[0, 5]); // EFER
        registers[472..476].copy_from_slice(&0xc000_0082_u32.to_ne_bytes());
        registers[480..].copy_from_slice(&0xffff_ffff_8120_0040_u64.to_ne_bytes());
        let mut page = vec![0; 4096];
        page[0x200..0x210].copy_from_slice(b"Linux version 7\n");
        let host = |header: &Header, payload: &[u8]| {
            let data = match Command::from_id(header.id) {
                Some(Command::VcpuGetRegisters) => registers.clone(),
                Some(Command::VcpuTranslateGva) => {
                    let kernel = payload[8..] == 0xffff_ffff_8120_0000_u64.to_ne_bytes();
                    let gpa = if kernel { 0x5000 } else { u64::MAX };
                    gpa.to_ne_bytes().to_vec()
                }
                _ => page.clone(),
            };
            let head = ReplyHead::success(header, data.len()).unwrap();
            [head.as_bytes(), &data].concat()
        };
        let symbols = Symbols::parse(MAP.as_bytes()).unwrap();
        let names = with_script(host, |vm| Names::locate(Some(symbols), vm, &[0]));
        test(&names.unwrap());
    }

    #[test]
    fn places_are_named_for_people_and_for_programs() {
        with_names(|names| {
            let at = 0xffff_ffff_8120_0104;
            assert_eq!(names.text(at).unwrap(), "schedule+0x4/0x100");
            let expected = Printed {
                symbol: "schedule".to_owned(),
                offset: "0x4".to_owned(),
                size: Some("0x100".to_owned()),
                module: None,
            };
            assert_eq!(names.json(at), Some(expected));
            assert_eq!((names.text(4), names.json(4)), (None, None));
        });
    }

    #[test]
    fn without_a_file_nothing_has_a_name() {
        let names = Names::none();
        assert!(!names.are_known());
        assert_eq!(names.text(0xffff_ffff_8120_0104), None);
        assert!(names.address("schedule").is_err());
    }

    #[test]
    fn file_may_be_absent_but_not_wrong() {
        let load = |file: Option<PathBuf>| Names::load(&SymbolFile { file });
        assert!(load(None).unwrap().is_none());
        assert!(load(Some(PathBuf::new())).unwrap().is_none());
        assert!(load(Some("/nonexistent".into())).is_err());
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"0 T hidden\n").unwrap();
        let error = load(Some(file.path().to_owned())).unwrap_err();
        let hidden = error.downcast_ref::<LoadError>();
        assert!(matches!(hidden, Some(LoadError::Hidden)), "{error}");
    }
}
