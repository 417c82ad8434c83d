// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Arguments of the commands that concern what a guest may do with its pages.

use std::time::Duration;

use clap::Args;
use kvmi_client::Access;

use super::{Reach, Selector, SymbolFile};
use crate::{address::Address, area::Area, number};

/// Arguments of `guard`.
#[derive(Args, Debug)]
pub struct Guard {
    #[command(flatten)]
    pub vm: Reach,
    /// What to guard: guest physical addresses (0x1000, 1M..2M), or symbols of the guest's kernel
    /// (linux_banner, _stext.._etext, __start_rodata..__end_rodata).
    #[arg(required = true, value_name = "RANGE|SYMBOL|SYMBOL..SYMBOL")]
    pub areas: Vec<Area>,
    /// What to deny: some of the letters r, w and x.
    #[arg(long, value_name = "KINDS", default_value = "w", value_parser = denied)]
    pub deny: Access,
    /// Report accesses, and let the guest do them (the default).
    #[arg(long, conflicts_with = "block")]
    pub watch: bool,
    /// Report accesses, and do not let the guest do them.
    #[arg(long)]
    pub block: bool,
    /// Report also what the CPU itself does to page tables of the guest while it walks them.
    #[arg(long)]
    pub page_walks: bool,
    #[command(flatten)]
    pub until: Until,
    #[command(flatten)]
    pub symbols: SymbolFile,
}

/// Arguments of `watch`.
#[derive(Args, Debug)]
pub struct Watch {
    #[command(flatten)]
    pub vm: Reach,
    /// Where the structure is: a guest physical address, a symbol of the guest's kernel, or
    /// SYMBOL+0x10.
    #[arg(value_name = "GPA|SYMBOL")]
    pub address: Address,
    /// Its size in bytes; by default that of the symbol, or else 1.
    #[arg(long, value_name = "BYTES", value_parser = number::parse)]
    pub size: Option<u64>,
    #[command(flatten)]
    pub until: Until,
    #[command(flatten)]
    pub symbols: SymbolFile,
}

/// When to stop; by default at an interrupt.
#[derive(Args, Clone, Copy, Debug, Default)]
#[group(skip)]
pub struct Until {
    /// Stop after so many reports.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Stop after this time, in seconds.
    #[arg(long = "for", value_name = "SECONDS", value_parser = number::parse_seconds)]
    pub duration: Option<Duration>,
}

/// Arguments of `access`.
#[derive(Args, Debug)]
pub struct List {
    #[command(flatten)]
    pub vm: Selector,
}

fn denied(text: &str) -> Result<Access, String> {
    let access: Access = text.parse()?;
    if access.is_empty() {
        return Err("expected at least one of the letters r, w and x".to_owned());
    }
    Ok(access)
}
