// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Memory as addresses, numbers and characters.

use std::io::{self, Write};

const LINE: usize = 16;

/// Prints what it is given, sixteen bytes a line, however it comes in.
#[derive(Debug)]
pub struct HexDump {
    gpa: u64,
    line: Vec<u8>,
}

impl HexDump {
    /// Begins at an address.
    pub fn new(gpa: u64) -> Self {
        Self {
            gpa,
            line: Vec::with_capacity(LINE),
        }
    }

    /// Takes more bytes, and prints the lines that are full.
    pub fn push(&mut self, bytes: &[u8], to: &mut impl Write) -> io::Result<()> {
        for byte in bytes {
            self.line.push(*byte);
            if self.line.len() == LINE {
                self.print(to)?;
            }
        }
        Ok(())
    }

    /// Prints the last line.
    pub fn finish(mut self, to: &mut impl Write) -> io::Result<()> {
        if self.line.is_empty() {
            return Ok(());
        }
        self.print(to)
    }

    fn print(&mut self, to: &mut impl Write) -> io::Result<()> {
        write!(to, "{:016x} ", self.gpa)?;
        for column in 0..LINE {
            let gap = if column == LINE / 2 { " " } else { "" };
            match self.line.get(column) {
                Some(byte) => write!(to, "{gap} {byte:02x}")?,
                None => write!(to, "{gap}   ")?,
            }
        }
        to.write_all(b"  |")?;
        to.write_all(&printable(&self.line))?;
        to.write_all(b"|\n")?;
        self.gpa = self.gpa.wrapping_add(LINE as u64);
        self.line.clear();
        Ok(())
    }
}

/// Replaces what a terminal cannot show by dots.
pub fn printable(bytes: &[u8]) -> Vec<u8> {
    let show = |byte: &u8| match byte {
        b' '..=b'~' => *byte,
        _ => b'.',
    };
    bytes.iter().map(show).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_do_not_depend_on_the_pieces() {
        let bytes: Vec<u8> = (0x3a..0x3a + 20).collect();
        for piece in [1, 3, 16, 20] {
            let mut dump = HexDump::new(0xfff8);
            let mut out = Vec::new();
            for part in bytes.chunks(piece) {
                dump.push(part, &mut out).unwrap();
            }
            dump.finish(&mut out).unwrap();
            let expected = "\
000000000000fff8  3a 3b 3c 3d 3e 3f 40 41  42 43 44 45 46 47 48 49  |:;<=>?@ABCDEFGHI|
0000000000010008  4a 4b 4c 4d                                       |JKLM|
";
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
    }

    #[test]
    fn nothing_gives_nothing() {
        let mut out = Vec::new();
        HexDump::new(0).finish(&mut out).unwrap();
        assert!(out.is_empty());
        assert_eq!(printable(b"a\x1b\xff\n~"), b"a...~");
    }
}
