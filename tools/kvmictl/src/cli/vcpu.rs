// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Arguments of the commands that concern vCPUs.

use std::time::Duration;

use clap::Args;

use super::{Reach, SymbolFile};
use crate::{
    address::Address,
    cpuid::Leaf,
    exception::{self, Vector},
    msr::{self, Msr},
    number,
};

/// Arguments of `pause`.
#[derive(Args, Debug)]
pub struct Pause {
    #[command(flatten)]
    pub vm: Reach,
    /// For how long, in seconds; by default until an interrupt.
    #[arg(long = "for", value_name = "SECONDS", value_parser = number::parse_seconds)]
    pub duration: Option<Duration>,
    #[command(flatten)]
    pub symbols: SymbolFile,
}

/// Arguments of `regs`.
#[derive(Args, Debug)]
pub struct Regs {
    #[command(flatten)]
    pub vm: Reach,
    /// This vCPU only.
    #[arg(long, value_name = "N")]
    pub vcpu: Option<u16>,
    /// Print these MSRs, too: names such as LSTAR, or numbers.
    #[arg(
        long = "msr",
        value_name = "NAME|NUMBER",
        value_delimiter = ',',
        value_parser = msr::parse
    )]
    pub msrs: Vec<Msr>,
    #[command(flatten)]
    pub symbols: SymbolFile,
}

/// Arguments of `cpuid`.
#[derive(Args, Debug)]
pub struct Cpuid {
    #[command(flatten)]
    pub vm: Reach,
    /// Which vCPU.
    #[arg(long, value_name = "N", default_value = "0")]
    pub vcpu: u16,
    /// Leaf and subleaf, such as 0x80000008, 7.1 or 0xd.0.
    #[arg(value_name = "LEAF[.SUB]")]
    pub leaf: Leaf,
}

/// Arguments of `translate`.
#[derive(Args, Debug)]
pub struct Translate {
    #[command(flatten)]
    pub vm: Reach,
    /// The vCPU whose virtual address it is.
    #[arg(long, value_name = "N", default_value = "0")]
    pub vcpu: u16,
    /// Tell which entries of the guest's page tables say so, too.
    #[arg(long)]
    pub tables: bool,
    /// Guest virtual address: a number, a symbol such as init_task, or SYMBOL+0x10.
    pub gva: Address,
    #[command(flatten)]
    pub symbols: SymbolFile,
}

/// Arguments of `inject`.
#[derive(Args, Debug)]
pub struct Inject {
    #[command(flatten)]
    pub vm: Reach,
    /// Which vCPU.
    #[arg(long, value_name = "N", default_value = "0")]
    pub vcpu: u16,
    /// Which exception: a vector below 32, or a name such as UD.
    #[arg(value_parser = exception::parse)]
    pub vector: Vector,
    /// Error code, for exceptions that have one.
    #[arg(long, value_name = "E", default_value = "0", value_parser = number::parse_u16)]
    pub error_code: u16,
    /// Address of a page fault: a number, a symbol, or SYMBOL+0x10.
    #[arg(long, value_name = "GVA", default_value = "0")]
    pub address: Address,
    #[command(flatten)]
    pub symbols: SymbolFile,
}

/// Arguments of `top`.
#[derive(Args, Debug)]
pub struct Top {
    #[command(flatten)]
    pub vm: Reach,
    /// Time between two looks, in seconds.
    #[arg(long, value_name = "S", default_value = "1", value_parser = number::parse_seconds)]
    pub interval: Duration,
    /// Stop after so many looks; by default at an interrupt.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    #[command(flatten)]
    pub symbols: SymbolFile,
}
