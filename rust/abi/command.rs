// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Structures of commands and of their replies.

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

use crate::{
    error::KvmiError,
    id::{
        Event,
        Scope, //
    },
    policy::Policy, //
};

/// Largest piece of guest memory that one command reads or writes, in bytes.
pub const MAX_MEMORY_ACCESS: usize = 4096;

/// What this host can do beyond the minimum (`kvmi_features`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Features {
    /// 1 if vCPUs can be single-stepped.
    pub singlestep: u8,
    /// 0.
    pub padding: [u8; 7],
}

/// Reply to `GET_VERSION` (`kvmi_get_version_reply`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GetVersionReply {
    /// [`crate::wire::VERSION`] of the host.
    pub version: u32,
    /// [`crate::wire::MAX_MSG_SIZE`] of the host.
    pub max_msg_size: u32,
    /// What the host can do.
    pub features: Features,
}

/// Request of `VM_CHECK_COMMAND` and `VM_CHECK_EVENT` (`kvmi_vm_check_command`,
/// `kvmi_vm_check_event`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CheckId {
    /// The id in question.
    pub id: u16,
    /// 0.
    pub padding1: u16,
    /// 0.
    pub padding2: u32,
}

/// Reply to `VM_GET_INFO` (`kvmi_vm_get_info_reply`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VmInfo {
    /// Number of vCPUs that are online.
    pub vcpu_count: u32,
    /// 0.
    pub padding: [u32; 3],
}

/// Request of `VM_CONTROL_EVENTS` and `VCPU_CONTROL_EVENTS` (`kvmi_vm_control_events`,
/// `kvmi_vcpu_control_events`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ControlEvents {
    /// Which event.
    pub event_id: u16,
    /// 1 to switch it on, 0 to switch it off.
    pub enable: u8,
    /// 0.
    pub padding1: u8,
    /// 0.
    pub padding2: u32,
}

impl ControlEvents {
    /// Checks the request for an event of `scope`: which one, and whether to switch it on.
    pub fn check(&self, scope: Scope, policy: &Policy) -> Result<(Event, bool), KvmiError> {
        if self.padding1 != 0 || self.padding2 != 0 {
            return Err(KvmiError::Inval);
        }
        let enable = flag(self.enable)?;
        let event = Event::from_id(self.event_id)
            .filter(|e| e.is_served() && e.scope() == scope)
            .ok_or(KvmiError::Inval)?;
        if !policy.allows_event(event) {
            return Err(KvmiError::Perm);
        }
        Ok((event, enable))
    }
}

/// Takes a flag of the protocol for what it means.
pub(crate) fn flag(value: u8) -> Result<bool, KvmiError> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(KvmiError::Inval),
    }
}

/// A piece of one page of guest memory: request of `VM_READ_PHYSICAL`, and of
/// `VM_WRITE_PHYSICAL`, where the data follows (`kvmi_vm_read_physical`,
/// `kvmi_vm_write_physical`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GuestRange {
    /// First guest physical address.
    pub gpa: u64,
    /// Number of bytes.
    pub size: u16,
    /// 0.
    pub padding1: u16,
    /// 0.
    pub padding2: u32,
}

impl GuestRange {
    /// Whether the range is one that a command may name: not empty, inside one 4 KiB page, no
    /// padding set.
    pub fn is_valid(&self) -> bool {
        let len = usize::from(self.size);
        // Lossless: the remainder is below 4096.
        let offset = (self.gpa % MAX_MEMORY_ACCESS as u64) as usize;
        self.padding1 == 0 && self.padding2 == 0 && len != 0 && offset + len <= MAX_MEMORY_ACCESS
    }
}

/// Request of `VM_CONTROL_CLEANUP` (`kvmi_vm_control_cleanup`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ControlCleanup {
    /// 1 if unhooking shall restore interceptions, 0 if not.
    pub enable: u8,
    /// 0.
    pub padding: [u8; 7],
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(gpa: u64, size: u16) -> GuestRange {
        GuestRange {
            gpa,
            size,
            ..Default::default()
        }
    }

    #[test]
    fn range_inside_one_page_is_valid() {
        assert!(range(0, 1).is_valid());
        assert!(range(0x1000, 4096).is_valid());
        assert!(range(0x1fff, 1).is_valid());
        assert!(range(u64::MAX, 1).is_valid());
        assert!(range(u64::MAX - 4095, 4096).is_valid());
    }

    #[test]
    fn empty_large_or_crossing_range_is_not_valid() {
        assert!(!range(0x1000, 0).is_valid());
        assert!(!range(0x1000, 4097).is_valid());
        assert!(!range(0x1001, 4096).is_valid());
        assert!(!range(0x1fff, 2).is_valid());
        assert!(!range(u64::MAX, 2).is_valid());
    }

    #[test]
    fn range_with_padding_set_is_not_valid() {
        let mut r = range(0, 8);
        r.padding1 = 1;
        assert!(!r.is_valid());
        let mut r = range(0, 8);
        r.padding2 = 1 << 31;
        assert!(!r.is_valid());
    }
}
