// SPDX-License-Identifier: GPL-2.0

//! Random numbers that nobody can guess.
//!
//! C header: [`include/linux/random.h`](srctree/include/linux/random.h)

use kernel::{
    bindings,
    error::to_result,
    prelude::*, //
};

/// Fills `bytes`. May sleep: early after boot, until the kernel has collected enough randomness.
///
/// Fails with `ERESTARTSYS` if a signal is pending meanwhile.
pub fn fill(bytes: &mut [u8]) -> Result {
    // SAFETY: No preconditions but a context that may sleep.
    to_result(unsafe { bindings::wait_for_random_bytes() })?;
    // SAFETY: `bytes` may be written to, as many as there are.
    unsafe { bindings::get_random_bytes(bytes.as_mut_ptr().cast(), bytes.len()) };
    Ok(())
}
