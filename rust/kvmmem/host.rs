// SPDX-License-Identifier: GPL-2.0

//! The host below, and the hypercalls that it is asked with.
//!
//! Each of them takes as long as the host likes: it may have to fetch a page. The callers hold no
//! lock, neither a spin lock nor that of an address space.
//!
//! C header: [`arch/x86/include/asm/kvm_para.h`](srctree/arch/x86/include/asm/kvm_para.h)

mod batch;

use kernel::{
    page::Page,
    prelude::*,
    task::might_sleep, //
};
use kvmi_abi::{
    hypercall::{
        MapEntry,
        MEM_MAP,
        MEM_MAP_MANY,
        MEM_UNMAP,
        MEM_UNMAP_MANY, //
    },
    hypercall_result::{
        decode,
        HypercallError, //
    }, //
};

pub(crate) use batch::Batch;

use crate::secret::TokenRef;

/// Fails with `ENODEV` unless the host is KVM, and can see the memory of this VM.
pub(crate) fn expect_kvm() -> Result {
    // SAFETY: This may be called at any time.
    if unsafe { kvmmem_bindings::kvmmem_host_is_kvm() } {
        Ok(())
    } else {
        Err(ENODEV)
    }
}

/// Returns the guest physical address of `page`.
pub(crate) fn gpa(page: &Page) -> u64 {
    // SAFETY: The page is valid by the type invariant of `Page`.
    unsafe { kvmmem_bindings::kvmmem_page_to_phys(page.as_ptr()) }
}

/// Overwrites a secret that is not needed any more.
pub(crate) fn wipe(secret: &mut [u8]) {
    // SAFETY: All of the slice may be written to.
    unsafe { kvmmem_bindings::kvmmem_wipe(secret.as_mut_ptr().cast(), secret.len()) };
}

/// Has the page at `gpa` of this VM replaced by that at `target_gpa` of the VM that the token is for.
///
/// The caller has seen to it that nothing but user space relies on the page's content.
pub(crate) fn map(token: TokenRef<'_>, target_gpa: u64, gpa: u64) -> Result<(), HypercallError> {
    call(MEM_MAP, token.as_ptr().addr() as u64, target_gpa, gpa, 0).map(drop)
}

/// Has the page at `gpa` of this VM be its own again.
pub(crate) fn unmap(gpa: u64) -> Result<(), HypercallError> {
    call(MEM_UNMAP, gpa, 0, 0, 0).map(drop)
}

/// Does what [`map`] does for every entry of `batch`, or for none.
pub(crate) fn map_many(token: TokenRef<'_>, batch: &Batch<MapEntry>) -> Result<(), HypercallError> {
    call(
        MEM_MAP_MANY,
        token.as_ptr().addr() as u64,
        batch.gpa(),
        batch.len() as u64,
        0,
    )
    .map(drop)
}

/// Does what [`unmap`] does for the entries of `batch`. Returns for how many of them, from the first
/// one on, it is done.
pub(crate) fn unmap_many(batch: &Batch<u64>) -> Result<usize, HypercallError> {
    call(
        MEM_UNMAP_MANY,
        batch.gpa(),
        batch.len() as u64,
        0,
        batch.len(),
    )
}

/// Makes a hypercall of which the result is at most `max`.
fn call(nr: u32, a0: u64, a1: u64, a2: u64, max: usize) -> Result<usize, HypercallError> {
    might_sleep();
    // SAFETY: The module is loaded on KVM only, see `expect_kvm`. What the host does to the memory
    // of this VM is the business of the callers above.
    let result =
        unsafe { kvmmem_bindings::kvmmem_hypercall(nr, a0 as usize, a1 as usize, a2 as usize) };
    decode(result as i64, max)
}
