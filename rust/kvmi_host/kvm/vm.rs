// SPDX-License-Identifier: GPL-2.0

//! Virtual machines.

use core::{
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    bindings::EFAULT as RAW_EFAULT,
    error::{
        from_err_ptr,
        to_result, //
    },
    new_mutex,
    prelude::*,
    sync::Mutex,
    types::Opaque, //
};
use kvmi_abi::KvmiError;
use kvmi_bindings as bindings;

use super::access::{
    access_error,
    Restriction, //
};

/// What an administrator wants to know about a VM.
pub(crate) use bindings::kvmi_vm_info as VmInfo;

/// A VM (`struct kvm`) that somebody keeps alive.
#[repr(transparent)]
pub(crate) struct Vm(Opaque<bindings::kvm>);

/// Tells VMs apart. Says nothing about whether the VM still exists.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmId(usize);

impl Vm {
    /// Makes a reference of a pointer from C.
    ///
    /// # Safety
    ///
    /// `vm` must be valid for `'a`.
    pub(super) unsafe fn from_raw<'a>(vm: *mut bindings::kvm) -> &'a Self {
        // SAFETY: Valid by the safety requirements of this function; `Vm` is transparent.
        unsafe { &*vm.cast() }
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::kvm {
        self.0.get()
    }

    /// Returns what tells this VM from others as long as it exists.
    pub(crate) fn id(&self) -> VmId {
        VmId(self.as_ptr().addr())
    }

    /// Describes the VM. May sleep.
    pub(crate) fn info(&self) -> VmInfo {
        let mut info = VmInfo::default();
        // SAFETY: `self` is a valid VM, `info` may be written to.
        unsafe { bindings::kvmi_vm_get_info(self.as_ptr(), &mut info) };
        info
    }

    /// Returns begin and size, in bytes, of the lowest memory slot that ends after `gpa`, or
    /// `ENOENT` if there is none. May sleep.
    pub(crate) fn next_memory(&self, gpa: u64) -> Result<(u64, u64)> {
        let (mut start, mut size) = (0, 0);
        // SAFETY: `self` is a valid VM, `start` and `size` may be written to.
        to_result(unsafe {
            bindings::kvmi_vm_next_memory(self.as_ptr(), gpa, &mut start, &mut size)
        })?;
        Ok((start, size))
    }

    /// Returns the lowest restricted page from `gfn` on, and a mask of what the guest may not do
    /// with it.
    pub(crate) fn next_restriction(&self, mut gfn: u64) -> Option<(u64, u32)> {
        // SAFETY: `self` is a valid VM, `gfn` may be written to.
        match unsafe { bindings::kvmi_vm_next_access(self.as_ptr(), &mut gfn) } {
            0 => None,
            denied => Some((gfn, denied)),
        }
    }

    /// Whether the current process may introspect this VM without the VMM's consent.
    ///
    /// Fails with `EPERM` unless it has CAP_SYS_ADMIN and could `ptrace()` the VMM, and with
    /// `ESRCH` if the VMM is gone.
    pub(crate) fn may_attach(&self) -> Result {
        // SAFETY: `self` is a valid VM.
        to_result(unsafe { bindings::kvmi_vm_may_attach(self.as_ptr()) })
    }
}

/// A counted reference to a VM. Putting it may destroy the VM, thus sleep.
///
/// # Invariants
///
/// This value owns a reference to the VM.
pub(crate) struct VmRef(NonNull<bindings::kvm>);

impl VmRef {
    /// Takes a reference to the VM behind the VM file descriptor `fd` of the current process.
    ///
    /// Fails with `EBADF` if there is no such descriptor, `EINVAL` if it is no VM's.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        // SAFETY: No preconditions.
        let vm = from_err_ptr(unsafe { bindings::kvmi_vm_get_from_fd(fd) })?;
        // INVARIANT: On success we got a reference.
        NonNull::new(vm).map(Self).ok_or(EINVAL)
    }
}

impl Deref for VmRef {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        // SAFETY: By the type invariant the VM is valid as long as `self`.
        unsafe { Vm::from_raw(self.0.as_ptr()) }
    }
}

impl Drop for VmRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours.
        unsafe { bindings::kvmi_vm_put(self.0.as_ptr()) };
    }
}

/// The address of a VM that is attached, and so cannot be destroyed.
#[derive(Clone, Copy)]
struct AttachedPtr(*mut bindings::kvm);

// SAFETY: The helpers that take a VM may be called from any thread.
unsafe impl Send for AttachedPtr {}

/// Access to the memory of a VM as long as it is attached.
///
/// Holds no reference to the VM: the VM's destruction ends the access, not the other way round.
#[pin_data]
pub(crate) struct AttachedVm {
    /// Empty before and after. Held during an access, so emptying it waits for the access to end.
    #[pin]
    vm: Mutex<Option<AttachedPtr>>,
    /// The same, held while its pages are lent to another VM or taken back: who does that does not
    /// wait for an access, which takes as long as the VM's memory does.
    #[pin]
    lender: Mutex<Option<AttachedPtr>>,
}

impl AttachedVm {
    /// Creates an access to nothing; an [`Attachment`](super::Attachment) fills it.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            vm <- new_mutex!(None, "AttachedVm::vm"),
            lender <- new_mutex!(None, "AttachedVm::lender"),
        })
    }

    /// Gives access to `vm`.
    ///
    /// # Safety
    ///
    /// `vm` must stay valid until [`Self::clear`] returns.
    pub(super) unsafe fn fill(&self, vm: &Vm) {
        let ptr = AttachedPtr(vm.as_ptr());
        *self.vm.lock() = Some(ptr);
        *self.lender.lock() = Some(ptr);
    }

    /// Ends the access, waiting for one that is under way.
    pub(super) fn clear(&self) {
        *self.lender.lock() = None;
        *self.vm.lock() = None;
    }

    /// Calls `f` with the VM unless it is detached.
    fn with<R>(&self, f: impl FnOnce(&Vm) -> R) -> Option<R> {
        let vm = self.vm.lock();
        // SAFETY: By the safety requirements of `fill()` the VM is valid until `clear()` returns,
        // which takes the lock that we hold.
        vm.as_ref().map(|ptr| f(unsafe { Vm::from_raw(ptr.0) }))
    }

    /// Calls `f`, which lends pages or takes them back, with the VM unless it is detached.
    pub(super) fn with_lender<R>(&self, f: impl FnOnce(&Vm) -> R) -> Option<R> {
        let vm = self.lender.lock();
        // SAFETY: As in `with()`.
        vm.as_ref().map(|ptr| f(unsafe { Vm::from_raw(ptr.0) }))
    }

    /// Reads guest memory at `gpa`, inside one page. May sleep.
    pub(crate) fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), KvmiError> {
        self.access(buf.len(), |vm, len| {
            // SAFETY: `vm` is a valid VM and `buf` has `len` bytes.
            unsafe { bindings::kvmi_vm_read_gpa(vm, gpa, buf.as_mut_ptr().cast(), len) }
        })
    }

    /// Writes guest memory at `gpa`, inside one page. May sleep.
    pub(crate) fn write(&self, gpa: u64, data: &[u8]) -> Result<(), KvmiError> {
        self.access(data.len(), |vm, len| {
            // SAFETY: `vm` is a valid VM and `data` has `len` bytes.
            unsafe { bindings::kvmi_vm_write_gpa(vm, gpa, data.as_ptr().cast(), len) }
        })
    }

    /// Denies the guest accesses to pages, or grants them again; fails with the error of the first
    /// page that cannot be changed, after all others are. May sleep.
    pub(crate) fn set_access(&self, pages: &mut [Restriction]) -> Result<(), KvmiError> {
        let count = u32::try_from(pages.len()).map_err(|_| KvmiError::Inval)?;
        let ret = self
            .with(|vm| {
                // SAFETY: `vm` is a valid VM that is attached, `pages` has `count` transparent
                // wrappers of `kvmi_page_access`.
                unsafe {
                    bindings::kvmi_vm_set_access(vm.as_ptr(), pages.as_mut_ptr().cast(), count)
                }
            })
            .unwrap_or(-(RAW_EFAULT as i32));
        to_result(ret).map_err(access_error)
    }

    /// Grants the guest all accesses again. May sleep.
    pub(crate) fn clear_access(&self) {
        // SAFETY: `vm` is a valid VM that is attached.
        self.with(|vm| unsafe { bindings::kvmi_vm_clear_access(vm.as_ptr()) });
    }

    /// Runs a memory helper and translates its result.
    fn access(
        &self,
        len: usize,
        helper: impl FnOnce(*mut bindings::kvm, u32) -> i32,
    ) -> Result<(), KvmiError> {
        let len = u32::try_from(len).map_err(|_| KvmiError::Inval)?;
        let ret = self
            .with(|vm| helper(vm.as_ptr(), len))
            .unwrap_or(-(RAW_EFAULT as i32));
        to_result(ret).map_err(memory_error)
    }
}

/// Tells the tool why memory could not be accessed; "not obtainable" of whatever kind is one
/// error in the protocol.
fn memory_error(error: Error) -> KvmiError {
    if error == EINVAL {
        KvmiError::Inval
    } else if error == ENOMEM {
        KvmiError::NoMem
    } else if error == Error::from_errno(-(kernel::bindings::EOPNOTSUPP as i32)) {
        KvmiError::OpNotSupp
    } else {
        KvmiError::NoEnt
    }
}
