// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl read`

use std::{io::Write as _, os::fd::AsFd};

use anyhow::{Context as _, Result};
use kvmi_client::{pages, Command, Connection, Error, KvmiError};
use serde::Serialize;

use crate::{
    address::Address,
    cli::{Format, Read},
    hexdump::{printable, HexDump},
    memory::{self, scan, Via},
    output::{gpa, hex, Output},
    problem::Problem,
};

/// What is printed as JSON.
#[derive(Serialize)]
struct Memory {
    #[serde(skip_serializing_if = "Option::is_none")]
    gpa: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gva: Option<String>,
    length: u64,
    /// The bytes, in hexadecimal.
    data: String,
}

/// Prints guest memory.
pub fn run(arguments: &Read, output: &mut Output) -> Result<()> {
    if let (Address::Symbol { .. }, false) = (&arguments.address, arguments.is_virtual) {
        let what = "a symbol has a virtual address, and a physical one is to be read";
        return Err(Problem::new(what, "add --virtual").into());
    }
    let (via, mut session) = memory::open(&arguments.source)?;
    let address = arguments
        .address
        .resolve(&arguments.symbols, &mut session)?;
    let mut printer = Printer::new(arguments, address, output);
    if arguments.is_virtual {
        session.check_vcpu(arguments.vcpu)?;
        let mut paused = session.pause()?;
        let bytes = read_virtual(&mut paused, &via, arguments.vcpu, address, arguments.len)?;
        paused.resume()?;
        // Not before: whoever reads the output may take its time.
        printer.push(&bytes)?;
    } else {
        let range = (address, arguments.len);
        read_physical(&mut session.vm, &via, range, |bytes| printer.push(bytes))?;
    }
    session.close()?;
    printer.finish()
}

/// Reads memory at a physical address, all of which has to be there, page by page.
fn read_physical<S: AsFd>(
    vm: &mut Connection<S>,
    via: &Via,
    (start, len): (u64, u64),
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    scan(vm, via, start, len, |page| {
        let absent = Error::Kvmi(KvmiError::NoEnt, Command::VmReadPhysical);
        let bytes = page.bytes.ok_or(absent);
        let bytes =
            bytes.with_context(|| format!("cannot read guest memory at {}", gpa(page.gpa)))?;
        take(bytes)?;
        Ok(true)
    })
}

/// Reads memory at a virtual address.
fn read_virtual<S: AsFd>(
    vm: &mut Connection<S>,
    via: &Via,
    vcpu: u16,
    gva: u64,
    len: u64,
) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for piece in pages(gva, len)? {
        let mut read = || {
            let unmapped = Error::Unmapped(piece.gpa);
            let gpa = vm.translate_gva(vcpu, piece.gpa)?.ok_or(unmapped)?;
            read_physical(vm, via, (gpa, piece.len as u64), |part| {
                bytes.extend_from_slice(part);
                Ok(())
            })
        };
        read().with_context(|| format!("cannot read guest memory at {}", hex(piece.gpa)))?;
    }
    Ok(bytes)
}

/// Prints memory as it is wanted.
struct Printer<'a> {
    arguments: &'a Read,
    address: u64,
    output: &'a mut Output,
    dump: HexDump,
    data: String,
}

impl<'a> Printer<'a> {
    fn new(arguments: &'a Read, address: u64, output: &'a mut Output) -> Self {
        Self {
            arguments,
            address,
            output,
            dump: HexDump::new(address),
            data: String::new(),
        }
    }

    /// Takes more bytes.
    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        if self.output.is_json() {
            self.data.push_str(&::hex::encode(bytes));
            return Ok(());
        }
        match self.arguments.format {
            Format::Hex => self.dump.push(bytes, self.output)?,
            Format::Raw => self.output.write_all(bytes)?,
            Format::Text => self.output.write_all(&text(bytes))?,
        }
        Ok(())
    }

    /// Ends the output.
    fn finish(self) -> Result<()> {
        if self.output.is_json() {
            let address = hex(self.address);
            let (gpa, gva) = match self.arguments.is_virtual {
                true => (None, Some(address)),
                false => (Some(address), None),
            };
            return Ok(self.output.json(&Memory {
                gpa,
                gva,
                length: self.arguments.len,
                data: self.data,
            })?);
        }
        match self.arguments.format {
            Format::Hex => self.dump.finish(self.output)?,
            Format::Raw => {}
            Format::Text => self.output.line("")?,
        }
        Ok(())
    }
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
    use crate::memory::tests::with_script;
    use kvmi_client::abi::wire::ReplyHead;

    #[test]
    fn text_keeps_lines() {
        assert_eq!(text(b"one\n\ttwo\0\x1b\xc3"), b"one\n\ttwo...");
    }

    /// Reads from a VM of whose virtual memory only the page at 0x7000 is mapped, to 0.
    fn read(address: u64, len: u64) -> Result<Vec<u8>> {
        let host = |header: &kvmi_client::abi::wire::Header, payload: &[u8]| {
            let data = if header.id == Command::VcpuTranslateGva.id() {
                assert_eq!(payload[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
                let gva = u64::from_ne_bytes(payload[8..16].try_into().unwrap());
                let mapped = gva & !0xfff == 0x7000;
                let gpa = if mapped { gva & 0xfff } else { u64::MAX };
                gpa.to_ne_bytes().to_vec()
            } else {
                assert!(payload[1] < 16);
                vec![7; usize::from(payload[8]) + 256 * usize::from(payload[9])]
            };
            let head = ReplyHead::success(header, data.len()).unwrap();
            [head.as_bytes(), &data].concat()
        };
        with_script(host, |vm| read_virtual(vm, &Via::Commands, 1, address, len))
    }

    #[test]
    fn virtual_memory_is_read_as_far_as_it_is_mapped() {
        assert_eq!(read(0x7000, 0x1000).unwrap(), vec![7; 0x1000]);
        assert_eq!(read(0x7fff, 1).unwrap(), [7]);
        let error = read(0x7fff, 2).unwrap_err();
        let cause = error.downcast_ref::<Error>().unwrap();
        assert!(matches!(cause, Error::Unmapped(0x8000)));
    }
}
