// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl cpuid`

use std::str::FromStr;

use anyhow::Result;
use kvmi_client::abi::vcpu::CpuidReply;
use serde::Serialize;

use crate::{
    cli,
    hexdump::printable,
    number,
    output::{hex, Output},
    session::Session,
};

/// A leaf of CPUID, and a part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// EAX
    pub leaf: u32,
    /// ECX
    pub subleaf: u32,
}

impl FromStr for Leaf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (leaf, subleaf) = text.split_once('.').unwrap_or((text, "0"));
        Ok(Self {
            leaf: number::parse_u32(leaf)?,
            subleaf: number::parse_u32(subleaf)?,
        })
    }
}

/// What is printed as JSON.
#[derive(Serialize)]
struct Cpuid {
    vcpu: u16,
    leaf: String,
    subleaf: String,
    eax: String,
    ebx: String,
    ecx: String,
    edx: String,
}

/// Prints what CPUID tells the guest.
pub fn run(arguments: &cli::Cpuid, output: &mut Output) -> Result<()> {
    let Leaf { leaf, subleaf } = arguments.leaf;
    let vcpu = arguments.vcpu;
    let mut session = Session::open(&arguments.vm)?;
    session.check_vcpu(vcpu)?;
    let reply = session.vm.get_cpuid(vcpu, leaf, subleaf)?;
    session.close()?;

    if output.is_json() {
        return Ok(output.json(&Cpuid {
            vcpu,
            leaf: hex(leaf),
            subleaf: hex(subleaf),
            eax: hex(reply.eax),
            ebx: hex(reply.ebx),
            ecx: hex(reply.ecx),
            edx: hex(reply.edx),
        })?);
    }
    for line in lines(&reply) {
        output.line(line)?;
    }
    Ok(())
}

/// For people: the registers, one a line, with their bits and, for the leaves with names, as text.
fn lines(reply: &CpuidReply) -> [String; 4] {
    [
        ("eax", reply.eax),
        ("ebx", reply.ebx),
        ("ecx", reply.ecx),
        ("edx", reply.edx),
    ]
    .map(|(name, value)| {
        let text = printable(&value.to_le_bytes());
        let text = String::from_utf8_lossy(&text);
        format!("{name}  {value:08x}  {value:032b}  |{text}|")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_may_have_subleaves() {
        let leaf = |leaf, subleaf| Ok(Leaf { leaf, subleaf });
        assert_eq!("7".parse(), leaf(7, 0));
        assert_eq!("0xd.1".parse(), leaf(13, 1));
        assert_eq!("0x80000008".parse(), leaf(0x8000_0008, 0));
        for bad in ["", ".", "7.", ".1", "1.2.3", "0x100000000", "x"] {
            assert!(bad.parse::<Leaf>().is_err(), "{bad}");
        }
    }

    #[test]
    fn registers_are_numbers_bits_and_text() {
        let reply = CpuidReply {
            eax: 5,
            ebx: u32::from_le_bytes(*b"Genu"),
            ..Default::default()
        };
        let lines = lines(&reply);
        assert_eq!(
            lines[0],
            format!("eax  00000005  {}101  |....|", "0".repeat(29))
        );
        assert!(lines[1].starts_with("ebx  756e6547"), "{}", lines[1]);
        assert!(lines[1].ends_with("|Genu|"), "{}", lines[1]);
    }
}
