// SPDX-License-Identifier: GPL-2.0 OR MIT

//! From the lines of a file to a table.

use std::io::{self, BufRead, Read as _};

use super::table::{Builder, Table};

/// Bytes of the longest line: a symbol may have 512, a module 56.
const MAX_LINE: u64 = 1024;

/// Characters of a wrong line that are told.
const SHOWN: usize = 60;

/// The half of the address space that belongs to the kernel.
const KERNEL_HALF: u64 = 0xffff_8000_0000_0000;

/// Why a file of symbols cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// A line is not "ADDRESS TYPE NAME" or "ADDRESS TYPE NAME [MODULE]".
    #[error("line {line} is none of a System.map, nor of /proc/kallsyms: {text:?}")]
    Malformed {
        /// Its number, from 1 on.
        line: usize,
        /// How it begins.
        text: String,
    },
    /// All addresses are 0.
    #[error("all addresses are 0: /proc/kallsyms was read without the right to see them")]
    Hidden,
    /// No symbol has an address that a 64-bit kernel could have.
    #[error("there are no symbols of a 64-bit kernel in it")]
    NotKernel,
    /// More than can be told apart.
    #[error("there are too many symbols in it")]
    TooLarge,
}

/// Reads a whole file.
pub(super) fn read(mut from: impl BufRead) -> Result<Table, LoadError> {
    let mut builder = Builder::default();
    let mut line = Vec::new();
    let (mut highest, mut empty) = (0, true);
    for number in 1.. {
        line.clear();
        if (&mut from).take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let symbol = Symbol::parse(&line).ok_or_else(|| malformed(number, &line))?;
        highest = highest.max(symbol.address);
        empty = false;
        builder
            .add(symbol.address, symbol.kind, symbol.name, symbol.module)
            .ok_or(LoadError::TooLarge)?;
    }
    // Not one by one: symbols of CPUs may begin at 0.
    match highest {
        0 if !empty => Err(LoadError::Hidden),
        KERNEL_HALF.. => Ok(builder.finish()),
        _ => Err(LoadError::NotKernel),
    }
}

fn malformed(line: usize, bytes: &[u8]) -> LoadError {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_end().chars().take(SHOWN).collect();
    LoadError::Malformed { line, text }
}

/// A line.
struct Symbol<'a> {
    address: u64,
    /// Its type, as `nm` has it.
    kind: u8,
    name: &'a str,
    module: Option<&'a str>,
}

impl<'a> Symbol<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?;
        let mut words = line.split_ascii_whitespace();
        let address = words.next().filter(|digits| {
            // The standard library would take a sign.
            digits.len() <= 16 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
        })?;
        let kind = match words.next()?.as_bytes() {
            [kind] if kind.is_ascii_alphabetic() || *kind == b'?' => *kind,
            _ => return None,
        };
        let name = words.next().filter(|name| is_printable(name))?;
        let module = match words.next() {
            Some(word) => Some(word.strip_prefix('[')?.strip_suffix(']')?),
            None => None,
        };
        let module = module.filter(|name| is_printable(name));
        if words.next().is_some() {
            return None;
        }
        Some(Self {
            address: u64::from_str_radix(address, 16).ok()?,
            kind,
            name,
            module,
        })
    }
}

fn is_printable(name: &str) -> bool {
    !name.is_empty() && !name.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: impl AsRef<[u8]>) -> LoadError {
        read(text.as_ref()).unwrap_err()
    }

    #[test]
    fn lines_of_both_kinds_of_file_are_understood() {
        let table = read(
            &b"0000000000000000 A fixed_percpu_data\n\
               ffffffff81000000 T _text\r\n\
               \n\
               ffffffff81000040 t r\xc3\xbcck\n\
               ffffffffc0201000 t nested_exit\t[kvm_amd]\n\
               ffffffffc0301000 ? last [bpf]"[..],
        );
        assert_eq!(table.unwrap().count(), 5);
    }

    #[test]
    fn lines_that_are_no_symbols_are_told() {
        let good = "ffffffff81000000 T _text\n";
        for bad in [
            "ffffffffffffffff B The real System.map is in the linux-image-7.2-dbg package",
            "ffffffff81000000 T",
            "ffffffff81000000 TT name",
            "ffffffff81000000 0 name",
            "+fffffff81000000 T name",
            "0xffffff81000000 T name",
            "1ffffffff81000000 T name",
            "name T ffffffff81000000",
            "ffffffff81000000 T name module",
            "ffffffff81000000 T name [module] more",
            "ffffffff81000000 T na\x1bme",
        ] {
            let error = error(format!("{good}{bad}\n"));
            let LoadError::Malformed { line, text } = error else {
                panic!("{bad}: {error}");
            };
            assert_eq!(line, 2);
            assert!(bad.starts_with(&text), "{bad}");
        }
    }

    #[test]
    fn garbage_is_no_file_of_symbols() {
        let is_malformed =
            |text: &[u8]| matches!(error(text), LoadError::Malformed { line: 1, .. });
        assert!(is_malformed(b"\x7fELF\x02\x01\x01\0\0"));
        assert!(is_malformed(&[0xff; 5000]));
        // Not even a line that never ends is kept in memory.
        let endless = io::BufReader::new(io::repeat(b'f'));
        assert!(
            matches!(read(endless), Err(LoadError::Malformed { line: 1, text }) if text.len() == SHOWN)
        );
    }

    #[test]
    fn hidden_and_foreign_addresses_are_errors_of_their_own() {
        let hidden = "0000000000000000 T _text\n0000000000000000 t do_idle\t[m]\n";
        assert!(matches!(error(hidden), LoadError::Hidden));
        for foreign in [
            "",
            "\n\n",
            "c1000000 T _text\n",
            "00007f0000000000 T main\n",
        ] {
            assert!(matches!(error(foreign), LoadError::NotKernel), "{foreign}");
        }
    }

    #[test]
    fn failure_to_read_is_told() {
        let error = super::super::Symbols::load("/nonexistent/System.map").unwrap_err();
        assert!(matches!(error, LoadError::Io(_)));
        assert!(matches!(
            super::super::Symbols::load("/"),
            Err(LoadError::Io(_))
        ));
    }
}
