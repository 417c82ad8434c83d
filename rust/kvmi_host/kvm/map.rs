// SPDX-License-Identifier: GPL-2.0

//! Pages of one VM in another one.

use kernel::{
    alloc::AllocError,
    error::to_result,
    prelude::*, //
};
use kvmi_abi::{
    access::PAGE_SIZE,
    hypercall::MapEntry,
    KvmiError, //
};
use kvmi_bindings as bindings;

use super::{
    vcpu::CurrentVcpu,
    vm::AttachedVm, //
};

/// Which page stands for which page of the target, as kvm.ko takes it.
#[repr(transparent)]
pub(crate) struct PageMap(bindings::kvmi_page_map);

impl PageMap {
    /// Makes one of an entry whose addresses are pages'.
    pub(crate) fn new(entry: &MapEntry) -> Self {
        Self(bindings::kvmi_page_map {
            gfn: entry.gpa / PAGE_SIZE,
            target_gfn: entry.target_gpa / PAGE_SIZE,
        })
    }
}

/// Why pages are not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapError {
    /// A signal is pending.
    Interrupted,
    /// There is a page of another VM already.
    Already,
    /// One that the protocol knows.
    Kvmi(KvmiError),
}

impl From<KvmiError> for MapError {
    fn from(error: KvmiError) -> Self {
        Self::Kvmi(error)
    }
}

impl From<AllocError> for MapError {
    fn from(_: AllocError) -> Self {
        Self::Kvmi(KvmiError::NoMem)
    }
}

impl From<Error> for MapError {
    fn from(error: Error) -> Self {
        if error == EINTR {
            return Self::Interrupted;
        }
        if error == EEXIST {
            return Self::Already;
        }
        // "Temporarily not possible" is "busy" for callers of the hypercall.
        let known = [
            (ENOENT, KvmiError::NoEnt),
            (EFAULT, KvmiError::Fault),
            (ENOMEM, KvmiError::NoMem),
            (EPERM, KvmiError::Perm),
            (EAGAIN, KvmiError::Busy),
        ];
        let found = known.into_iter().find(|(errno, _)| *errno == error);
        let unsupported = Error::from_errno(-(kernel::bindings::EOPNOTSUPP as i32));
        Self::Kvmi(match found {
            Some((_, error)) => error,
            None if error == unsupported => KvmiError::OpNotSupp,
            None => KvmiError::Inval,
        })
    }
}

impl CurrentVcpu {
    /// Has this vCPU's guest see pages of `target` in place of its own, all of them or none. May
    /// sleep.
    ///
    /// `in_force` is asked whether it still may, when [`AttachedVm::take_back`] either finds what
    /// is mapped or has begun after whatever makes the answer "no".
    pub(crate) fn map(
        &self,
        target: &AttachedVm,
        pages: &[PageMap],
        writable: bool,
        in_force: impl FnOnce() -> bool,
    ) -> Result<(), MapError> {
        let count = u32::try_from(pages.len()).map_err(|_| KvmiError::TooBig)?;
        let mapped = target.with_lender(|target| {
            if !in_force() {
                return Err(KvmiError::NoEnt.into());
            }
            // SAFETY: By the type invariant this is the vCPU's thread in a callback; `target` is
            // attached as long as this runs; `pages` has `count` transparent wrappers of
            // `kvmi_page_map`.
            to_result(unsafe {
                bindings::kvmi_vcpu_map(
                    self.as_ptr(),
                    target.as_ptr(),
                    pages.as_ptr().cast(),
                    count,
                    writable,
                )
            })?;
            Ok(())
        });
        // A session that ends takes its tokens with it.
        mapped.unwrap_or(Err(KvmiError::NoEnt.into()))
    }

    /// Has the guest see its own pages again; returns how many of `gfns` were mapped, from the
    /// first one on, and are not any more. May sleep.
    pub(crate) fn unmap(&self, gfns: &[u64]) -> usize {
        // What does not fit is not unmapped, and the caller is told so.
        let count = u32::try_from(gfns.len()).unwrap_or(u32::MAX);
        // SAFETY: By the type invariant this is the vCPU's thread in a callback; `gfns` has at
        // least `count` numbers.
        let done = unsafe { bindings::kvmi_vcpu_unmap(self.as_ptr(), gfns.as_ptr(), count) };
        // Lossless: at most as many as there are.
        done as usize
    }
}

impl AttachedVm {
    /// Takes this VM's pages back from all introspectors. May sleep.
    pub(crate) fn take_back(&self) {
        // SAFETY: `vm` is a valid VM that is attached.
        self.with_lender(|vm| unsafe { bindings::kvmi_vm_take_back(vm.as_ptr()) });
    }
}
