// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Arguments of the commands that concern what a guest does by itself.

use clap::Args;
use kvmi_client::abi::{guest_control::is_controllable_msr, guest_event::Cr};

use super::{Reach, SymbolFile, Until};
use crate::{
    address::Address,
    area::Area,
    msr::{self, Msr},
    number,
};

/// Arguments of `trace`.
#[derive(Args, Debug)]
pub struct Trace {
    #[command(flatten)]
    pub vm: Reach,
    #[command(flatten)]
    pub kinds: Kinds,
    /// Only these vCPUs.
    #[arg(long = "vcpu", value_name = "N", value_delimiter = ',')]
    pub vcpus: Vec<u16>,
    /// Only writes of this value.
    #[arg(long, value_name = "V", value_parser = number::parse)]
    pub value: Option<u64>,
    /// Only what instructions at these virtual addresses do: a symbol of the guest's kernel stands
    /// for all of a function.
    #[arg(long, value_name = "RANGE|SYMBOL|SYMBOL..SYMBOL")]
    pub rip: Option<Area>,
    /// Print nothing but the counters at the end.
    #[arg(long)]
    pub summary: bool,
    #[command(flatten)]
    pub until: Until,
    #[command(flatten)]
    pub symbols: SymbolFile,
}

/// What to trace.
#[derive(Args, Debug, Default)]
#[group(required = true, multiple = true)]
pub struct Kinds {
    /// Writes to these control registers: some of 0, 3 and 4.
    #[arg(
        long = "cr",
        value_name = "N",
        value_delimiter = ',',
        value_parser = control_register,
        help_heading = "What to trace"
    )]
    pub crs: Vec<Cr>,
    /// Writes to these MSRs: names such as LSTAR, or numbers.
    #[arg(
        long = "msr",
        value_name = "NAME|NUMBER",
        value_delimiter = ',',
        value_parser = controllable_msr,
        help_heading = "What to trace"
    )]
    pub msrs: Vec<Msr>,
    /// Writes to XCR0.
    #[arg(long, help_heading = "What to trace")]
    pub xsetbv: bool,
    /// Instructions that load or store IDTR, GDTR, LDTR or TR.
    #[arg(long, help_heading = "What to trace")]
    pub descriptors: bool,
    /// Hypercalls to the tool; they succeed, then.
    #[arg(long = "hypercall", help_heading = "What to trace")]
    pub hypercalls: bool,
    /// Breakpoint instructions of the guest's own.
    #[arg(long = "breakpoint", help_heading = "What to trace")]
    pub breakpoints: bool,
}

/// Arguments of `break`.
#[derive(Args, Debug)]
pub struct Break {
    #[command(flatten)]
    pub vm: Reach,
    /// Virtual addresses of instructions: numbers, symbols such as do_exit, or SYMBOL+0x10.
    #[arg(required = true, value_name = "ADDRESS|SYMBOL")]
    pub addresses: Vec<Address>,
    #[command(flatten)]
    pub until: Until,
    #[command(flatten)]
    pub symbols: SymbolFile,
}

/// Arguments of `step`.
#[derive(Args, Debug)]
pub struct Step {
    #[command(flatten)]
    pub vm: Reach,
    /// How many instructions.
    #[arg(value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: u64,
    /// Which vCPU.
    #[arg(long, value_name = "N", default_value = "0")]
    pub vcpu: u16,
    #[command(flatten)]
    pub symbols: SymbolFile,
}

fn control_register(text: &str) -> Result<Cr, String> {
    let number = text
        .strip_prefix("CR")
        .or(text.strip_prefix("cr"))
        .unwrap_or(text);
    let number = number.parse().ok();
    number
        .and_then(Cr::from_number)
        .ok_or_else(|| "expected 0, 3 or 4".to_owned())
}

fn controllable_msr(text: &str) -> Result<Msr, String> {
    let msr = msr::parse(text)?;
    if is_controllable_msr(msr.0) {
        return Ok(msr);
    }
    let which = "up to 0x1fff, without 0x1db to 0x1de, and from 0xc0000000 to 0xc0001fff";
    Err(format!("only MSRs {which} can be traced"))
}
