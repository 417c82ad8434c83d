// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The standard output.

use std::io::{self, BufWriter, IsTerminal as _, Write};

use indicatif::BinaryBytes;
use serde::Serialize;

/// The standard output: text or JSON.
pub struct Output {
    to: Box<dyn Write>,
    terminal: bool,
    json: bool,
}

impl Output {
    /// The standard output of this process.
    pub fn new(json: bool) -> Self {
        let to = io::stdout();
        Self {
            terminal: to.is_terminal(),
            to: Box::new(BufWriter::new(to)),
            json,
        }
    }

    /// An output of which nothing is seen.
    #[cfg(test)]
    pub fn discard(json: bool) -> Self {
        Self {
            to: Box::new(io::sink()),
            terminal: false,
            json,
        }
    }

    /// Whether JSON is wanted.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Whether somebody looks at it directly.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Prints a value as one line of JSON.
    pub fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.to, value)?;
        self.to.write_all(b"\n")
    }

    /// Prints a line of text.
    pub fn line(&mut self, line: impl std::fmt::Display) -> io::Result<()> {
        writeln!(self.to, "{line}")
    }

    /// Prints everything that is still in the buffer.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// A number of bytes for people.
pub fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// A guest physical address.
pub fn gpa(gpa: u64) -> String {
    hex(gpa)
}

/// A number in hexadecimal.
pub fn hex(number: impl Into<u64>) -> String {
    format!("{:#x}", number.into())
}

/// Removes what could upset a terminal from text that somebody else has chosen.
pub fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_addresses_are_readable() {
        assert_eq!(size(512 << 20), "512.00 MiB");
        assert_eq!(gpa(0x10_0000), "0x100000");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(plain("a\x1b[2Jb\nc"), "a?[2Jb?c");
    }
}
