// SPDX-License-Identifier: GPL-2.0

//! What this project's modules need and the `kernel` crate lacks.
//!
//! Each submodule wraps one C facility the way the `kernel` crate would: a type that owns the C
//! object, `unsafe` confined to the file, safe methods for the rest of the project.

pub mod kthread;
pub mod miscdev;
pub mod random;
pub mod socket;
mod wait;

/// Prefix of the messages printed from this crate.
#[allow(dead_code, reason = "the macros that print expect it")]
const __LOG_PREFIX: &[u8] = b"kvmi_common\0";
