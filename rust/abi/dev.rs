// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The interface of `/dev/kvmi`, for VMMs that know nothing of introspection.
//!
//! An open file hooks at most one VM and unhooks it when it is closed. The ioctls of
//! [`crate::ioctl`] other than HOOK work on the file as they do on a VM file descriptor; while
//! nothing is hooked, COMMAND and EVENT say what holds from the next [`ATTACH`] on.

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

use crate::ioctl::{
    iow,
    iowr,
    EventTimeout, //
};

/// ioctl type of `/dev/kvmi`.
pub const KVMI_IO: u32 = 0xB9;

/// Hooks a VM: takes an [`Attach`].
pub const ATTACH: u32 = iow::<Attach>(KVMI_IO, 0x00);
/// Describes a VM: takes and gives back a [`VmStatus`].
pub const VM_STATUS: u32 = iowr::<VmStatus>(KVMI_IO, 0x01);
/// Tells where a VM has memory: takes and gives back a [`VmMemory`]; fails with `ENOENT` if there
/// is none from the address given on.
pub const VM_MEMORY: u32 = iowr::<VmMemory>(KVMI_IO, 0x02);

/// Bounds how long a vCPU waits for the reply to an event: takes an [`EventTimeout`]. Concerns what
/// is hooked, or gets hooked next.
pub const EVENT_TIMEOUT: u32 = iow::<EventTimeout>(KVMI_IO, 0x03);

/// Says whether PF events are also sent for accesses of the CPU to the guest's page tables: takes a
/// [`PageWalks`]. Concerns what is hooked, or gets hooked next.
pub const PAGE_WALKS: u32 = iow::<PageWalks>(KVMI_IO, 0x04);

/// Tells which pages of a VM are restricted: takes and gives back a [`VmAccess`]; fails with
/// `ENOENT` if none is from the address given on.
pub const VM_ACCESS: u32 = iowr::<VmAccess>(KVMI_IO, 0x05);

/// Allows a VM's guest to map pages of VMs that are introspected, if it has a token for that, or
/// forbids it again: takes an [`Introspector`]. This is so until the VM is gone, whoever has the
/// file open. Fails with `EEXIST` if it is allowed already or the VM is introspected itself,
/// `ENOENT` if it is not allowed.
pub const INTROSPECTOR: u32 = iow::<Introspector>(KVMI_IO, 0x06);

/// Argument of [`ATTACH`] (`kvmi_dev_attach`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Attach {
    /// VM file descriptor, in the calling process (see `pidfd_getfd(2)`).
    pub vm_fd: i32,
    /// A connected stream socket, in the calling process.
    pub socket_fd: i32,
    /// 0.
    pub flags: u32,
    /// 0.
    pub padding: u32,
    /// Names the VM in diagnostics.
    pub uuid: [u8; 16],
}

/// The VM is hooked: the fields about the session are valid.
pub const STATUS_HOOKED: u32 = 1 << 0;
/// The tool's end of the socket, or the host's, is closed.
pub const STATUS_DISCONNECTED: u32 = 1 << 1;

/// The VM is an introspector's.
pub const STATUS_INTROSPECTOR: u32 = 1 << 2;

/// Argument of [`VM_STATUS`] (`kvmi_dev_vm_status`): `vm_fd` is read, the rest is written.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VmStatus {
    /// VM file descriptor, in the calling process.
    pub vm_fd: i32,
    /// `STATUS_*`.
    pub flags: u32,
    /// First guest physical address past the highest memory slot.
    pub max_gpa: u64,
    /// Memory of the guest in bytes, ROM included.
    pub memory_bytes: u64,
    /// vCPUs that are online.
    pub vcpu_count: u32,
    /// Process that created the VM.
    pub vmm_pid: i32,
    /// Process that hooked the VM, in the initial pid namespace.
    pub hooked_by: i32,
    /// vCPUs that have served a request since the VM was hooked.
    pub vcpus_served: u32,
    /// Commands received since the VM was hooked.
    pub commands: u64,
    /// Events sent since the VM was hooked.
    pub events: u64,
    /// Changes of memory slots since the VM was hooked.
    pub memslot_changes: u64,
    /// Time that vCPUs have waited for replies to events since the VM was hooked, in ns.
    pub held_ns: u64,
    /// The uuid given when the VM was hooked.
    pub uuid: [u8; 16],
}

/// Argument of [`VM_MEMORY`] (`kvmi_dev_vm_memory`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VmMemory {
    /// VM file descriptor, in the calling process.
    pub vm_fd: i32,
    /// 0.
    pub padding: u32,
    /// In: where to look from on. Out: begin of the lowest memory slot that ends after that.
    pub gpa: u64,
    /// Out: bytes that the slot has.
    pub size: u64,
}

/// Argument of [`PAGE_WALKS`] (`kvmi_dev_page_walks`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PageWalks {
    /// 1 if there shall be events, 0 if such accesses are allowed without one.
    pub report: u32,
    /// 0.
    pub padding: u32,
}

/// Argument of [`VM_ACCESS`] (`kvmi_dev_vm_access`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VmAccess {
    /// VM file descriptor, in the calling process.
    pub vm_fd: i32,
    /// Out: what the guest may do, see [`crate::access`].
    pub access: u32,
    /// In: where to look from on. Out: begin of the first restricted pages.
    pub gpa: u64,
    /// Out: bytes from there on of which the guest may do the same.
    pub size: u64,
}

/// Argument of [`INTROSPECTOR`] (`kvmi_dev_introspector`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Introspector {
    /// VM file descriptor, in the calling process.
    pub vm_fd: i32,
    /// 1 to allow it, 0 to forbid it again.
    pub enable: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_carry_the_size_of_their_argument() {
        assert_eq!(ATTACH, 0x4020_B900);
        assert_eq!(VM_STATUS, 0xC058_B901);
        assert_eq!(VM_MEMORY, 0xC018_B902);
        assert_eq!(EVENT_TIMEOUT, 0x4008_B903);
        assert_eq!(PAGE_WALKS, 0x4008_B904);
        assert_eq!(VM_ACCESS, 0xC018_B905);
        assert_eq!(INTROSPECTOR, 0x4008_B906);
    }
}
