// SPDX-License-Identifier: GPL-2.0

//! Being called by kvm.ko.
//!
//! A [`Registration`] makes a type the provider of introspection; an [`Attachment`] makes one
//! value of it responsible for one VM. The callbacks from C do no more than turn pointers into
//! references and a `Result` into a number.

use core::marker::PhantomData;
use kernel::{
    error::{
        from_result,
        to_result, //
    },
    ffi::{
        c_int,
        c_long,
        c_uint,
        c_ulong,
        c_void, //
    },
    prelude::*,
    sync::Arc,
    types::ForeignOwnable, //
};
use kvmi_bindings as bindings;

use super::{
    vcpu::{
        CurrentVcpu,
        VcpuPtr,
        VcpuRemote, //
    },
    vm::{
        AttachedVm,
        Vm, //
    }, //
};

/// How a memory slot has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotChange {
    Create,
    Delete,
    Move,
    Flags,
}

impl SlotChange {
    fn from_raw(change: bindings::kvmi_slot_change) -> Option<Self> {
        match change {
            bindings::kvmi_slot_change_KVMI_SLOT_CREATE => Some(Self::Create),
            bindings::kvmi_slot_change_KVMI_SLOT_DELETE => Some(Self::Delete),
            bindings::kvmi_slot_change_KVMI_SLOT_MOVE => Some(Self::Move),
            bindings::kvmi_slot_change_KVMI_SLOT_FLAGS => Some(Self::Flags),
            _ => None,
        }
    }
}

/// A hypercall as kvm.ko reports it.
pub(crate) use bindings::kvmi_hypercall as GuestCall;

/// What the provider implements. A value of the type stands for one VM.
///
/// Contexts and locks of each callback: `struct kvm_introspection_ops` in
/// `include/linux/kvm_introspection.h`.
pub(crate) trait Provider: Send + Sync + Sized + 'static {
    /// What the provider keeps for each vCPU.
    type Vcpu: Send + Sync + 'static;

    /// Answer to `KVM_CHECK_EXTENSION`.
    const VERSION: u32;

    /// An ioctl on a VM file descriptor.
    fn vm_ioctl(vm: &Vm, cmd: u32, arg: usize) -> Result<isize>;

    /// The VM is being destroyed: it must not be attached any more on return.
    fn vm_destroy(vm: &Vm);

    /// Where the VM's memory is to be accessed through.
    fn vm(&self) -> &AttachedVm;

    /// A vCPU is there.
    fn vcpu_create(&self, index: u32, remote: Arc<VcpuRemote>) -> Result<Self::Vcpu>;

    /// A vCPU is not attached any more.
    fn vcpu_destroy(vcpu: &Self::Vcpu);

    /// A memory slot has changed.
    fn memslot(&self, change: SlotChange);

    /// Serves a request on the vCPU's thread, before it enters the guest. Fails with `EINTR` if a
    /// signal is pending, and is called again then.
    fn vcpu_work(vcpu: &Self::Vcpu, current: &CurrentVcpu) -> Result<WorkDone>;

    /// The guest makes a hypercall: returns the result for it, or nothing if it is not for the
    /// provider. Fails with `EINTR` if the guest has to repeat it.
    fn hypercall(vcpu: &Self::Vcpu, current: &CurrentVcpu, call: &GuestCall)
        -> Result<Option<i64>>;
}

/// What a vCPU does after [`Provider::vcpu_work`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WorkDone {
    /// Goes on.
    Enter,
    /// Leaves `KVM_RUN`, after [`CurrentVcpu::crash`].
    Leave,
}

/// What kvm.ko keeps for us for each vCPU.
struct VcpuSlot<P: Provider> {
    ptr: VcpuPtr,
    remote: Arc<VcpuRemote>,
    vcpu: P::Vcpu,
}

/// The registration of a provider, ended by dropping it.
///
/// # Invariants
///
/// `ops` is registered from initialisation to drop.
pub(crate) struct Registration<P> {
    ops: KBox<bindings::kvm_introspection_ops>,
    _p: PhantomData<P>,
}

// SAFETY: A provider may be unregistered on any thread.
unsafe impl<P> Send for Registration<P> {}
// SAFETY: There are no `&self` methods.
unsafe impl<P> Sync for Registration<P> {}

impl<P: Provider> Registration<P> {
    /// Registers `P`, which `module` implements.
    ///
    /// Fails with `EBUSY` if there is another provider, `EINVAL` if kvm.ko has another version of
    /// the interface.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Self> {
        let ops = bindings::kvm_introspection_ops {
            owner: module.as_ptr(),
            abi: bindings::KVM_INTROSPECTION_ABI,
            size: u32::try_from(size_of::<bindings::kvm_introspection_ops>())?,
            version: P::VERSION,
            reserved: 0,
            vm_ioctl: Some(Self::vm_ioctl),
            vm_destroy: Some(Self::vm_destroy),
            vcpu_create: Some(Self::vcpu_create),
            vcpu_destroy: Some(Self::vcpu_destroy),
            memslot: Some(Self::memslot),
            vcpu_work: Some(Self::vcpu_work),
            hypercall: Some(Self::hypercall),
        };
        let ops = KBox::new(ops, GFP_KERNEL)?;
        // SAFETY: `ops` has a stable address and lives until it is unregistered; its functions
        // belong to `module`, which kvm.ko pins while it calls them.
        to_result(unsafe { bindings::kvm_introspection_register(&*ops) })?;
        // INVARIANT: Just registered.
        Ok(Self {
            ops,
            _p: PhantomData,
        })
    }

    /// # Safety
    ///
    /// `kvm` must be valid for the duration of the call.
    unsafe extern "C" fn vm_ioctl(kvm: *mut bindings::kvm, cmd: c_uint, arg: c_ulong) -> c_long {
        // SAFETY: By the safety requirements of this function.
        let vm = unsafe { Vm::from_raw(kvm) };
        match P::vm_ioctl(vm, cmd, arg) {
            Ok(ret) => ret,
            // Lossless: 32 to 64 bits, with the sign.
            Err(e) => e.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// `kvm` must be valid for the duration of the call.
    unsafe extern "C" fn vm_destroy(kvm: *mut bindings::kvm) {
        // SAFETY: By the safety requirements of this function.
        P::vm_destroy(unsafe { Vm::from_raw(kvm) });
    }

    /// # Safety
    ///
    /// `vm_priv` must be what [`Attachment::new`] handed over, of an attachment that exists;
    /// `vcpu_priv` must be valid for writing.
    unsafe extern "C" fn vcpu_create(
        vm_priv: *mut c_void,
        vcpu: *mut bindings::kvm_vcpu,
        index: u32,
        vcpu_priv: *mut *mut c_void,
    ) -> c_int {
        // SAFETY: By the safety requirements of this function; the attachment owns a reference.
        let this = unsafe { Arc::<P>::borrow(vm_priv) };
        from_result(|| {
            let ptr = VcpuPtr::new(vcpu)?;
            // SAFETY: The vCPU is valid until `vcpu_destroy()`, which revokes.
            let remote = Arc::pin_init(unsafe { VcpuRemote::new(ptr) }, GFP_KERNEL)?;
            let room = KBox::new_uninit(GFP_KERNEL)?;
            let vcpu = this.vcpu_create(index, remote.clone()).inspect_err(|_| {
                // The provider may have kept a reference.
                remote.revoke();
            })?;
            let slot = room.write(VcpuSlot::<P> { ptr, remote, vcpu });
            // SAFETY: By the safety requirements of this function.
            unsafe { vcpu_priv.write(slot.into_foreign()) };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// `vcpu_priv` must come from [`Self::vcpu_create`]; nobody may use it any more.
    unsafe extern "C" fn vcpu_destroy(vcpu_priv: *mut c_void) {
        // SAFETY: By the safety requirements of this function.
        let slot = unsafe { KBox::<VcpuSlot<P>>::from_foreign(vcpu_priv) };
        slot.remote.revoke();
        P::vcpu_destroy(&slot.vcpu);
    }

    /// # Safety
    ///
    /// `vm_priv` must be what [`Attachment::new`] handed over, of an attachment that exists.
    unsafe extern "C" fn memslot(
        vm_priv: *mut c_void,
        _base_gfn: u64,
        _npages: u64,
        _as_id: u32,
        change: bindings::kvmi_slot_change,
    ) {
        // SAFETY: By the safety requirements of this function; the attachment owns a reference.
        let this = unsafe { Arc::<P>::borrow(vm_priv) };
        if let Some(change) = SlotChange::from_raw(change) {
            this.memslot(change);
        }
    }

    /// # Safety
    ///
    /// `vcpu_priv` must come from [`Self::vcpu_create`] and not have been destroyed.
    unsafe extern "C" fn vcpu_work(vcpu_priv: *mut c_void) -> c_int {
        // SAFETY: By the safety requirements of this function.
        let slot = unsafe { KBox::<VcpuSlot<P>>::borrow(vcpu_priv) };
        // SAFETY: This is that callback, and `current` ends with it.
        let current = unsafe { CurrentVcpu::new(slot.ptr) };
        match P::vcpu_work(&slot.vcpu, &current) {
            Ok(WorkDone::Enter) => 1,
            Ok(WorkDone::Leave) => 0,
            // The only error that kvm.ko knows here.
            Err(_) => EINTR.to_errno(),
        }
    }

    /// # Safety
    ///
    /// `vcpu_priv` must come from [`Self::vcpu_create`] and not have been destroyed; `call` must be
    /// valid and nobody else's.
    unsafe extern "C" fn hypercall(
        vcpu_priv: *mut c_void,
        call: *mut bindings::kvmi_hypercall,
    ) -> c_int {
        // SAFETY: By the safety requirements of this function.
        let slot = unsafe { KBox::<VcpuSlot<P>>::borrow(vcpu_priv) };
        // SAFETY: By the safety requirements of this function.
        let call = unsafe { &mut *call };
        // SAFETY: This is that callback, and `current` ends with it.
        let current = unsafe { CurrentVcpu::new(slot.ptr) };
        match P::hypercall(&slot.vcpu, &current, call) {
            Ok(Some(result)) => {
                // The same bits: the guest takes it for a signed number.
                call.ret = result as u64;
                1
            }
            Ok(None) => 0,
            Err(_) => EINTR.to_errno(),
        }
    }
}

impl<P> Drop for Registration<P> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant `ops` is registered.
        unsafe { bindings::kvm_introspection_unregister(&*self.ops) };
    }
}

/// A VM's attachment to a provider, ended by dropping it.
///
/// Dropping waits for callbacks that run, but neither for the guest, nor the VMM, nor a tool. It
/// may sleep, and must not happen inside a callback other than [`Provider::vm_destroy`].
///
/// # Invariants
///
/// `vm` is attached with `provider` as its private pointer, which owns a reference.
pub(crate) struct Attachment<P: Provider> {
    vm: *mut bindings::kvm,
    provider: *mut c_void,
    _p: PhantomData<Arc<P>>,
}

// SAFETY: A VM may be detached on any thread.
unsafe impl<P: Provider> Send for Attachment<P> {}
// SAFETY: There are no `&self` methods.
unsafe impl<P: Provider> Sync for Attachment<P> {}

impl<P: Provider> Attachment<P> {
    /// Makes `provider` responsible for `vm`, and gives it access to the VM's memory.
    ///
    /// Calls [`Provider::vcpu_create`] for each vCPU and asks each for one
    /// [`Provider::vcpu_work`]. Fails with `EEXIST` if the VM is attached, `EOPNOTSUPP` if it is
    /// one that cannot be introspected (SEV, TDX, nested guests).
    pub(crate) fn new(vm: &Vm, provider: Arc<P>) -> Result<Self> {
        let foreign = provider.clone().into_foreign();
        // SAFETY: `vm` is valid; `foreign` is what the callbacks expect and stays valid until
        // after `kvmi_vm_detach()`.
        to_result(unsafe { bindings::kvmi_vm_attach(vm.as_ptr(), foreign) }).inspect_err(|_| {
            // SAFETY: Not attached, so nobody else uses it.
            drop(unsafe { Arc::<P>::from_foreign(foreign) });
        })?;
        // SAFETY: An attached VM is not destroyed, and `drop()` clears before it detaches.
        unsafe { provider.vm().fill(vm) };
        // INVARIANT: Just attached.
        Ok(Self {
            vm: vm.as_ptr(),
            provider: foreign,
            _p: PhantomData,
        })
    }
}

impl<P: Provider> Drop for Attachment<P> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it owns a reference.
        unsafe { Arc::<P>::borrow(self.provider) }.vm().clear();
        // SAFETY: By the type invariant the VM is attached, and so valid: its destruction waits
        // for `vm_destroy()`, which returns only when the VM is detached.
        unsafe { bindings::kvmi_vm_detach(self.vm) };
        // SAFETY: Detached, so the callbacks are over and the reference is ours alone.
        drop(unsafe { Arc::<P>::from_foreign(self.provider) });
    }
}
