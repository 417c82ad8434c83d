// SPDX-License-Identifier: GPL-2.0 OR MIT

//! VMs of a few MiB whose guests are a few instructions, for tests and benchmarks.
//!
//! What cannot happen on a host that works panics: the programs that use this have nothing better
//! to do then.

pub mod guest;
pub mod memory;
mod runner;
pub mod vm;

pub use guest::Guest;
pub use memory::{tree_bytes, Memory};
pub use runner::{avoid_cpu0, handle_signals, Runner};
pub use vm::{Vm, MEMORY, PAGE, SCRATCH};
