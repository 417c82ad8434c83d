// SPDX-License-Identifier: GPL-2.0

//! What goes wrong, as programs get to know it.

use kernel::prelude::*;
use kvmi_abi::{
    hypercall_result::HypercallError,
    mem_range::RangeError, //
};

/// Tells a program why its arguments are refused.
pub(crate) fn of_range(error: RangeError) -> Error {
    match error {
        RangeError::TooMany => E2BIG,
        RangeError::Unaligned | RangeError::Empty | RangeError::Overflow | RangeError::Padding => {
            EINVAL
        }
    }
}

/// Tells a program why the host refuses.
pub(crate) fn of_hypercall(error: HypercallError) -> Error {
    Error::from_errno(-error.errno())
}

/// The page is mapped already, or is being mapped or unmapped just now. The `kernel` crate has no
/// `EALREADY`.
pub(crate) fn already() -> Error {
    of_hypercall(HypercallError::Already)
}
