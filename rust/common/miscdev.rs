// SPDX-License-Identifier: GPL-2.0

//! Misc devices whose open files keep their module loaded.
//!
//! [`kernel::miscdevice::MiscDeviceRegistration`] leaves `file_operations::owner` unset, which is
//! right for built-in code only: the module could be unloaded while a file is open.

use core::marker::PhantomData;
use kernel::{
    bindings,
    error::to_result,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions, //
    },
    prelude::*,
    types::Opaque, //
};

/// The registration of a misc device of a module, for root only (mode 0600).
///
/// # Invariants
///
/// `misc` is registered from initialisation to drop, and its `fops` is `fops`.
#[pin_data(PinnedDrop)]
pub struct OwnedMiscDevice<T> {
    #[pin]
    fops: Opaque<bindings::file_operations>,
    #[pin]
    misc: Opaque<bindings::miscdevice>,
    _p: PhantomData<T>,
}

// SAFETY: `misc_deregister()` may be called on any thread.
unsafe impl<T> Send for OwnedMiscDevice<T> {}
// SAFETY: There are no `&self` methods.
unsafe impl<T> Sync for OwnedMiscDevice<T> {}

impl<T: MiscDevice> OwnedMiscDevice<T> {
    /// Registers the device. May sleep.
    pub fn register(
        opts: MiscDeviceOptions,
        module: &'static ThisModule,
    ) -> impl PinInit<Self, Error> {
        // The callbacks expect a `MiscDeviceRegistration<T>`, which is a transparent
        // `miscdevice`.
        let mut raw = opts.into_raw::<T>();
        raw.mode = 0o600;
        // SAFETY: `into_raw()` points `fops` to a constant.
        let mut fops = unsafe { *raw.fops };
        fops.owner = module.as_ptr();

        try_pin_init!(&this in Self {
            fops: Opaque::new(fops),
            misc <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                // SAFETY: `this` is being initialised and already has its final address.
                raw.fops = unsafe { Opaque::cast_into(&raw const (*this.as_ptr()).fops) };
                // SAFETY: `slot` may be written to.
                unsafe { slot.write(raw) };
                // SAFETY: `slot` is pinned, and deregistered before it goes away.
                to_result(unsafe { bindings::misc_register(slot) })
            }),
            _p: PhantomData,
        })
    }
}

#[pinned_drop]
impl<T> PinnedDrop for OwnedMiscDevice<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the device is registered.
        unsafe { bindings::misc_deregister(self.misc.get()) };
    }
}
