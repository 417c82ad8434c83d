// SPDX-License-Identifier: GPL-2.0

//! What a guest may do with its pages.

use kvmi_abi::{
    access::{
        PageAccess,
        PfEvent,
        ALL,
        GVA_UNKNOWN, //
    },
    KvmiError, //
};
use kvmi_bindings as bindings;

// The kinds of access are those of the protocol.
const _: () = assert!(
    bindings::KVMI_ACCESS_R == kvmi_abi::access::R as u32
        && bindings::KVMI_ACCESS_W == kvmi_abi::access::W as u32
        && bindings::KVMI_ACCESS_X == kvmi_abi::access::X as u32
);

/// A page and what the guest may not do with it, as kvm.ko takes it.
#[repr(transparent)]
pub(crate) struct Restriction(bindings::kvmi_page_access);

impl Restriction {
    /// Nothing that could be denied.
    const NONSENSE: u32 = u32::MAX;

    /// Makes one of an entry of a command. That of an entry that makes no sense is refused by
    /// kvm.ko, as is one that the CPU cannot enforce.
    pub(crate) fn new(page: &PageAccess) -> Self {
        Self(bindings::kvmi_page_access {
            gfn: page.gfn(),
            denied: page.denied().map_or(Self::NONSENSE, u32::from),
            error: 0,
        })
    }
}

/// An access that the guest is denied, as kvm.ko reports it.
#[derive(Clone, Copy)]
pub(crate) struct Violation {
    gva: u64,
    gpa: u64,
    access: u32,
    flags: u32,
}

impl Violation {
    pub(super) fn from_raw(raw: &bindings::kvmi_violation) -> Self {
        Self {
            gva: raw.gva,
            gpa: raw.gpa,
            access: raw.access,
            flags: raw.flags,
        }
    }

    pub(super) fn to_raw(self) -> bindings::kvmi_violation {
        bindings::kvmi_violation {
            gva: self.gva,
            gpa: self.gpa,
            access: self.access,
            flags: self.flags,
        }
    }

    /// Whether the CPU tries this by itself, while it walks the page tables of the guest.
    pub(crate) fn is_page_walk(&self) -> bool {
        self.flags & bindings::KVMI_VIOLATION_WALK != 0
    }

    /// What the tool is told.
    pub(crate) fn event(&self) -> PfEvent {
        let is_known = self.flags & bindings::KVMI_VIOLATION_GVA != 0;
        PfEvent {
            gva: if is_known { self.gva } else { GVA_UNKNOWN },
            gpa: self.gpa,
            // Lossless: a bit of `ALL`.
            access: (self.access & u32::from(ALL)) as u8,
            ..PfEvent::default()
        }
    }
}

/// Tells the tool why access to a page could not be changed.
pub(super) fn access_error(error: kernel::error::Error) -> KvmiError {
    if error == kernel::error::code::ENOMEM {
        KvmiError::NoMem
    } else {
        KvmiError::Inval
    }
}
