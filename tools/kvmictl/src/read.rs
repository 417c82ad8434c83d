// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl read`

use std::io::Write as _;

use anyhow::{Context as _, Result};
use kvmi_client::{Command, Error, KvmiError};
use serde::Serialize;

use crate::{
    cli::{Format, Read},
    hexdump::{printable, HexDump},
    memory::scan,
    output::{gpa, Output},
    session::Session,
};

/// What is printed as JSON.
#[derive(Serialize)]
struct Memory {
    gpa: String,
    length: u64,
    /// The bytes, in hexadecimal.
    data: String,
}

/// Prints guest memory.
pub fn run(arguments: &Read, output: &mut Output) -> Result<()> {
    let mut session = Session::open(&arguments.vm)?;
    let mut dump = HexDump::new(arguments.gpa);
    let mut data = String::new();
    scan(&mut session.vm, arguments.gpa, arguments.len, |page| {
        let piece = page
            .bytes
            .ok_or(Error::Kvmi(KvmiError::NoEnt, Command::VmReadPhysical));
        let piece =
            piece.with_context(|| format!("cannot read guest memory at {}", gpa(page.gpa)))?;
        if output.is_json() {
            data.push_str(&hex::encode(piece));
            return Ok(true);
        }
        match arguments.format {
            Format::Hex => dump.push(piece, output)?,
            Format::Raw => output.write_all(piece)?,
            Format::Text => output.write_all(&text(piece))?,
        }
        Ok(true)
    })?;
    session.close()?;

    if output.is_json() {
        return Ok(output.json(&Memory {
            gpa: gpa(arguments.gpa),
            length: arguments.len,
            data,
        })?);
    }
    match arguments.format {
        Format::Hex => dump.finish(output)?,
        Format::Raw => {}
        Format::Text => output.line("")?,
    }
    Ok(())
}

/// Characters for a terminal; line feeds and tabs are kept.
fn text(bytes: &[u8]) -> Vec<u8> {
    let mut text = printable(bytes);
    for (to, from) in text.iter_mut().zip(bytes) {
        if matches!(from, b'\n' | b'\t') {
            *to = *from;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_keeps_lines() {
        assert_eq!(text(b"one\n\ttwo\0\x1b\xc3"), b"one\n\ttwo...");
    }
}
