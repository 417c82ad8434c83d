// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Virtual addresses as they are given: numbers or symbols.

use std::str::FromStr;

use anyhow::Result;

use crate::{cli::SymbolFile, number, problem::Problem, session::Session, symbols::Names};

/// Symbols are needed, for this reason, and there are none.
pub fn no_symbols(why: &str) -> anyhow::Error {
    let hint = "give the System.map of the guest's kernel with --symbols";
    Problem::new(format!("{why}, and no file has symbols"), hint).into()
}

/// A virtual address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// The address itself.
    Number(u64),
    /// So far behind a symbol of the guest's kernel.
    Symbol {
        /// Its name, maybe with that of its module before it.
        name: String,
        /// How far, in bytes.
        offset: u64,
    },
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // No symbol begins with a digit.
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            return number::parse(text).map(Self::Number);
        }
        let (name, offset) = match text.split_once('+') {
            Some((name, offset)) => (name, number::parse(offset)?),
            None => (text, 0),
        };
        if name.is_empty() || name.starts_with('-') || name.contains(char::is_whitespace) {
            return Err("expected a number, a symbol, or SYMBOL+NUMBER".to_owned());
        }
        Ok(Self::Symbol {
            name: name.to_owned(),
            offset,
        })
    }
}

impl Address {
    /// The address that is meant in a guest. The file is looked into only if need be.
    pub fn resolve(&self, file: &SymbolFile, session: &mut Session) -> Result<u64> {
        match self {
            Self::Number(address) => Ok(*address),
            Self::Symbol { name, .. } => {
                let Some(symbols) = Names::load(file)? else {
                    return Err(no_symbols(&format!("{name:?} is no number")));
                };
                let vcpus = session.vcpus();
                self.of(&Names::locate(Some(symbols), &mut session.vm, &vcpus)?)
            }
        }
    }

    /// Whether it is a symbol, or something behind one.
    pub fn is_symbol(&self) -> bool {
        matches!(self, Self::Symbol { .. })
    }

    /// Whether it is all that a symbol stands for.
    pub fn is_whole_symbol(&self) -> bool {
        matches!(self, Self::Symbol { offset: 0, .. })
    }

    /// The address that is meant, given the symbols.
    pub fn of(&self, names: &Names) -> Result<u64> {
        match self {
            Self::Number(address) => Ok(*address),
            Self::Symbol { name, offset } => {
                let start = names.address(name)?;
                start.checked_add(*offset).ok_or_else(|| {
                    let what = format!("{name}+{offset:#x} is beyond the last address");
                    Problem::new(what, "give a smaller number").into()
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbols::tests::with_names;

    fn symbol(name: &str, offset: u64) -> Result<Address, String> {
        let name = name.to_owned();
        Ok(Address::Symbol { name, offset })
    }

    #[test]
    fn numbers_and_symbols_are_told_apart() {
        assert_eq!("0x1000".parse(), Ok(Address::Number(4096)));
        assert_eq!("4K".parse(), Ok(Address::Number(4096)));
        assert_eq!("init_task".parse(), symbol("init_task", 0));
        assert_eq!("init_task+0x10".parse(), symbol("init_task", 16));
        assert_eq!("kvm:kvm_init+4".parse(), symbol("kvm:kvm_init", 4));
        assert_eq!("f00".parse(), symbol("f00", 0));
        for bad in ["", "+1", "a b", "a+", "a+b", "a+-1", "a+1+1", "0xx", "-a"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn symbols_stand_for_addresses_of_the_guest() {
        with_names(|names| {
            let of = |text: &str| text.parse::<Address>().unwrap().of(names);
            assert_eq!(of("77").unwrap(), 77);
            assert_eq!(of("schedule+2").unwrap(), 0xffff_ffff_8120_0102);
            assert!(of("nothing").is_err());
            let error = of("schedule+0xffffffffffffffff").unwrap_err();
            assert!(error.downcast_ref::<Problem>().is_some());
        });
    }
}
