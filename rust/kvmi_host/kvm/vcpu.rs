// SPDX-License-Identifier: GPL-2.0

//! vCPUs: as seen by other threads, and by their own.

use core::ptr::NonNull;
use kernel::{
    error::to_result,
    ffi::c_void,
    new_mutex,
    prelude::*,
    sync::Mutex,
    types::NotThreadSafe, //
};
use kvmi_abi::{
    arch::{
        Regs,
        Sregs, //
    },
    vcpu::{
        CpuidReply,
        InjectException,
        TrapEvent,
        XSAVE_SIZE, //
    },
    KvmiError, //
};
use kvmi_bindings as bindings;
use zerocopy::FromZeros;

use super::access::Violation;

/// The address of a vCPU between its creation and its destruction.
#[derive(Clone, Copy)]
pub(super) struct VcpuPtr(NonNull<bindings::kvm_vcpu>);

// SAFETY: What other threads than the vCPU's may do with it is up to those who use the address.
unsafe impl Send for VcpuPtr {}
// SAFETY: As above.
unsafe impl Sync for VcpuPtr {}

impl VcpuPtr {
    pub(super) fn new(vcpu: *mut bindings::kvm_vcpu) -> Result<Self> {
        NonNull::new(vcpu).map(Self).ok_or(EINVAL)
    }

    fn as_ptr(self) -> *mut bindings::kvm_vcpu {
        self.0.as_ptr()
    }
}

/// What any thread may ask of a vCPU. Methods may sleep.
#[pin_data]
pub(crate) struct VcpuRemote {
    /// Empty once the vCPU is not attached any more.
    #[pin]
    ptr: Mutex<Option<VcpuPtr>>,
}

impl VcpuRemote {
    /// # Safety
    ///
    /// `ptr` must stay valid until [`Self::revoke`] returns.
    pub(super) unsafe fn new(ptr: VcpuPtr) -> impl PinInit<Self> {
        pin_init!(Self {
            ptr <- new_mutex!(Some(ptr), "VcpuRemote::ptr"),
        })
    }

    /// Ends all access, waiting for what is under way.
    pub(super) fn revoke(&self) {
        *self.ptr.lock() = None;
    }

    /// Has the vCPU's thread call the provider soon.
    pub(crate) fn request(&self) {
        if let Some(ptr) = *self.ptr.lock() {
            // SAFETY: Valid until it is revoked, which takes the lock.
            unsafe { bindings::kvmi_vcpu_request(ptr.as_ptr()) };
        }
    }

    /// The same, and returns when the vCPU is out of the guest.
    pub(crate) fn request_sync(&self) {
        if let Some(ptr) = *self.ptr.lock() {
            // SAFETY: Valid until it is revoked, which takes the lock.
            unsafe { bindings::kvmi_vcpu_request_sync(ptr.as_ptr()) };
        }
    }

    /// Whether the vCPU has been started, by the VMM or by another vCPU.
    pub(crate) fn is_initialized(&self) -> bool {
        // SAFETY: Valid until it is revoked, which takes the lock.
        (*self.ptr.lock())
            .is_some_and(|ptr| unsafe { bindings::kvmi_vcpu_is_initialized(ptr.as_ptr()) })
    }
}

/// Why a wait on a vCPU's thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// What was waited for is there.
    Done,
    /// The time is over.
    Timeout,
    /// The VM is being detached: there must be no further wait.
    Detaching,
}

/// A vCPU whose thread this is, in a callback that may wait.
///
/// # Invariants
///
/// `ptr` is valid, and this is its vCPU's thread in `ops->vcpu_work` or in `ops->hypercall`, which
/// kvm.ko calls alike: with `kvm->srcu` held, and without any lock.
pub(crate) struct CurrentVcpu {
    ptr: VcpuPtr,
    _not_send: NotThreadSafe,
}

impl CurrentVcpu {
    /// # Safety
    ///
    /// Must be called on the vCPU's thread in a callback that may wait, and the value must not
    /// outlive that.
    pub(super) unsafe fn new(ptr: VcpuPtr) -> Self {
        // INVARIANT: By the safety requirements.
        Self {
            ptr,
            _not_send: NotThreadSafe,
        }
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::kvm_vcpu {
        self.ptr.as_ptr()
    }

    /// Waits until `done` says so, which is asked after each request of the vCPU; for
    /// `timeout_ns` at most unless that is 0. `done` must not sleep.
    ///
    /// Fails with `EINTR` if a signal is pending; the callback has to return that.
    pub(crate) fn wait<F: FnMut() -> bool>(&self, done: F, timeout_ns: u64) -> Result<Woken> {
        /// # Safety
        ///
        /// `arg` must point to an `F` that nobody else uses.
        unsafe extern "C" fn call<F: FnMut() -> bool>(arg: *mut c_void) -> bool {
            // SAFETY: By the safety requirements of this function.
            (unsafe { &mut *arg.cast::<F>() })()
        }

        let mut done = done;
        // SAFETY: By the type invariant this is the vCPU's thread in a callback; `done` outlives
        // the call, and only `call` uses it meanwhile.
        let ret = unsafe {
            bindings::kvmi_vcpu_wait(
                self.as_ptr(),
                Some(call::<F>),
                (&raw mut done).cast(),
                timeout_ns,
            )
        };
        match to_result(ret) {
            Ok(()) => Ok(Woken::Done),
            Err(e) if e == ENODEV => Ok(Woken::Detaching),
            Err(e) if e == Error::from_errno(-(kernel::bindings::ETIME as i32)) => {
                Ok(Woken::Timeout)
            }
            Err(_) => Err(EINTR),
        }
    }

    /// Calls `f`, which may sleep in whatever way, without keeping changes of the VM's memory
    /// slots waiting.
    pub(crate) fn unlocked<R, F: FnOnce() -> R>(&self, f: F) -> Result<R> {
        /// # Safety
        ///
        /// `arg` must point to a `(Option<F>, Option<R>)` that nobody else uses.
        unsafe extern "C" fn call<R, F: FnOnce() -> R>(arg: *mut c_void) {
            // SAFETY: By the safety requirements of this function.
            let slot = unsafe { &mut *arg.cast::<(Option<F>, Option<R>)>() };
            slot.1 = slot.0.take().map(|f| f());
        }

        let mut slot = (Some(f), None);
        // SAFETY: By the type invariant this is the vCPU's thread in a callback; `slot` outlives
        // the call, and only `call` uses it meanwhile.
        unsafe {
            bindings::kvmi_vcpu_unlocked(self.as_ptr(), Some(call::<R, F>), (&raw mut slot).cast())
        };
        slot.1.ok_or(EINVAL)
    }

    /// Makes `KVM_RUN` end with `KVM_EXIT_SHUTDOWN` when the callback returns.
    pub(crate) fn crash(&self) {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_crash(self.as_ptr()) };
    }

    /// Returns the general registers.
    pub(crate) fn regs(&self) -> Regs {
        let mut regs = Regs::new_zeroed();
        // SAFETY: By the type invariant this is the vCPU's thread in a callback; `Regs` has the
        // layout of `kvm_regs`, which the layout test of the client crate checks.
        unsafe { bindings::kvmi_vcpu_get_regs(self.as_ptr(), (&raw mut regs).cast()) };
        regs
    }

    /// Sets the general registers.
    pub(crate) fn set_regs(&self, regs: &Regs) {
        // SAFETY: As for `regs()`.
        unsafe { bindings::kvmi_vcpu_set_regs(self.as_ptr(), (&raw const *regs).cast()) };
    }

    /// Returns the system registers.
    pub(crate) fn sregs(&self) -> Sregs {
        let mut sregs = Sregs::new_zeroed();
        // SAFETY: As for `regs()`, with `kvm_sregs`.
        unsafe { bindings::kvmi_vcpu_get_sregs(self.as_ptr(), (&raw mut sregs).cast()) };
        sregs
    }

    /// Returns the default operand size of the code being run, in bytes: 2, 4 or 8.
    pub(crate) fn mode(&self) -> u32 {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_get_mode(self.as_ptr()) }
    }

    /// Reads an MSR as the VMM could.
    pub(crate) fn msr(&self, index: u32) -> Result<u64, KvmiError> {
        let mut data = 0;
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        to_result(unsafe { bindings::kvmi_vcpu_get_msr(self.as_ptr(), index, &mut data) })
            .map(|()| data)
            .map_err(|_| KvmiError::Inval)
    }

    /// Returns what the guest sees in a CPUID leaf.
    pub(crate) fn cpuid(&self, function: u32, index: u32) -> Result<CpuidReply, KvmiError> {
        let mut regs = [0; 4];
        // SAFETY: By the type invariant this is the vCPU's thread in a callback; there is room
        // for four registers.
        to_result(unsafe {
            bindings::kvmi_vcpu_get_cpuid(self.as_ptr(), function, index, regs.as_mut_ptr())
        })
        .map_err(|_| KvmiError::NoEnt)?;
        let [eax, ebx, ecx, edx] = regs;
        Ok(CpuidReply { eax, ebx, ecx, edx })
    }

    /// Returns XCR0.
    pub(crate) fn xcr0(&self) -> u64 {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_get_xcr0(self.as_ptr()) }
    }

    /// Copies the XSAVE area to `area`. May sleep.
    pub(crate) fn xsave(&self, area: &mut [u8; XSAVE_SIZE]) -> Result<(), KvmiError> {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback; `area` has as
        // many bytes as told.
        to_result(unsafe {
            bindings::kvmi_vcpu_get_xsave(
                self.as_ptr(),
                area.as_mut_ptr().cast(),
                XSAVE_SIZE as u32,
            )
        })
        .map_err(state_error)
    }

    /// Sets the XSAVE area. May sleep.
    pub(crate) fn set_xsave(&self, area: &[u8]) -> Result<(), KvmiError> {
        let len = u32::try_from(area.len()).map_err(|_| KvmiError::Inval)?;
        // SAFETY: By the type invariant this is the vCPU's thread in a callback; `area` has `len`
        // bytes.
        to_result(unsafe {
            bindings::kvmi_vcpu_set_xsave(self.as_ptr(), area.as_ptr().cast(), len)
        })
        .map_err(state_error)
    }

    /// Translates a guest virtual address; gives all ones if it is not mapped.
    pub(crate) fn gva_to_gpa(&self, gva: u64) -> u64 {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_gva_to_gpa(self.as_ptr(), gva) }
    }

    /// Returns the frequency of the guest's TSC in Hz.
    pub(crate) fn tsc_hz(&self) -> u64 {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_tsc_hz(self.as_ptr()) }
    }

    /// Has the guest take an exception; [`Self::trap`] tells what has become of it.
    pub(crate) fn inject(&self, request: &InjectException) -> Result<(), KvmiError> {
        let exception = bindings::kvmi_exception {
            address: request.address,
            error_code: request.error_code,
            nr: request.nr,
            ..Default::default()
        };
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        to_result(unsafe { bindings::kvmi_vcpu_inject(self.as_ptr(), &exception) })
            .map_err(state_error)
    }

    /// Takes the exception that the guest really gets after [`Self::inject`], if that is known.
    pub(crate) fn trap(&self) -> Option<TrapEvent> {
        let mut exception = bindings::kvmi_exception::default();
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_get_trap(self.as_ptr(), &mut exception) }.then(|| TrapEvent {
            nr: exception.nr,
            error_code: exception.error_code,
            address: exception.address,
            ..TrapEvent::default()
        })
    }

    /// Takes the access that the guest was denied last, if nobody has.
    pub(crate) fn violation(&self) -> Option<Violation> {
        let mut violation = bindings::kvmi_violation::default();
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_get_violation(self.as_ptr(), &mut violation) }
            .then(|| Violation::from_raw(&violation))
    }

    /// Has the guest do that once, if it still wants to.
    pub(crate) fn permit(&self, violation: &Violation) {
        // SAFETY: By the type invariant this is the vCPU's thread in a callback.
        unsafe { bindings::kvmi_vcpu_permit(self.as_ptr(), &violation.to_raw()) };
    }
}

/// Tells the tool why the state of a vCPU could not be changed.
fn state_error(error: Error) -> KvmiError {
    if error == EBUSY {
        KvmiError::Busy
    } else if error == ENOMEM {
        KvmiError::NoMem
    } else {
        KvmiError::Inval
    }
}
