// SPDX-License-Identifier: GPL-2.0

//! Arguments of ioctls that have a token in them: whoever knows it may map another VM's memory.
//!
//! They are in memory of their own, never on the stack, and wiped after use.

use core::ops::Deref;
use kernel::{
    prelude::*,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};
use kvmi_abi::{
    mem::{
        MemMap,
        MemMapMany, //
    },
    token::MapToken, //
};
use zerocopy::{
    FromBytes,
    IntoBytes, //
};

use crate::host;

/// An argument that has a token in it, which stays where it is.
pub(crate) trait HasToken: FromBytes + IntoBytes {
    /// The token.
    fn token(&self) -> &MapToken;
}

impl HasToken for MemMap {
    fn token(&self) -> &MapToken {
        &self.token
    }
}

impl HasToken for MemMapMany {
    fn token(&self) -> &MapToken {
        &self.token
    }
}

/// The whole is within one page, whatever the allocator's alignment.
#[repr(C, align(64))]
struct Aligned<T>(T);

/// An argument with a token. Memory of the slab, hence at an address that the host can translate
/// at any time.
pub(crate) struct Secret<T: HasToken>(KBox<Aligned<T>>);

impl<T: HasToken> Secret<T> {
    const FITS: () = assert!(size_of::<T>() <= 64);

    /// Copies the argument at `address` from user space; fails with `EFAULT` if it is not readable.
    /// May sleep.
    pub(crate) fn from_user(address: usize) -> Result<Self> {
        let () = Self::FITS;
        let mut secret = Self(KBox::new(Aligned(T::new_zeroed()), GFP_KERNEL)?);
        UserSlice::new(UserPtr::from_addr(address), size_of::<T>())
            .reader()
            .read_slice(secret.0 .0.as_mut_bytes())?;
        Ok(secret)
    }

    /// The token, where the host may read it.
    pub(crate) fn token(&self) -> TokenRef<'_> {
        TokenRef(self.0 .0.token())
    }
}

impl<T: HasToken> Deref for Secret<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0 .0
    }
}

impl<T: HasToken> Drop for Secret<T> {
    fn drop(&mut self) {
        host::wipe(self.0 .0.as_mut_bytes());
    }
}

/// A token within one page of memory that the host can find: that of a [`Secret`].
#[derive(Clone, Copy)]
pub(crate) struct TokenRef<'a>(&'a MapToken);

impl TokenRef<'_> {
    /// Where it is.
    pub(crate) fn as_ptr(self) -> *const MapToken {
        self.0
    }
}
