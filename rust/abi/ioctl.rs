// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The ioctls on a VM file descriptor, for VMMs that know introspection.
//!
//! Dispatch is on the full number: mainline KVM uses the same `nr`s for other ioctls, with other
//! directions and sizes.

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

/// Argument of `KVM_INTROSPECTION_HOOK`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Hook {
    /// A connected stream socket of the calling process.
    pub fd: i32,
    /// 0.
    pub padding: u32,
    /// Names the VM in diagnostics.
    pub uuid: [u8; 16],
}

/// Argument of `KVM_INTROSPECTION_COMMAND` and `KVM_INTROSPECTION_EVENT`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Feature {
    /// 1 to allow, 0 to disallow.
    pub allow: u32,
    /// Message id, or -1 for all.
    pub id: i32,
}

/// Argument of `KVM_INTROSPECTION_EVENT_TIMEOUT` and of `/dev/kvmi`'s EVENT_TIMEOUT.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct EventTimeout {
    /// Milliseconds; 0 means for ever. When they are over the tool is disconnected.
    pub ms: u32,
    /// 0.
    pub padding: u32,
}

/// ioctl type of KVM.
pub const KVMIO: u32 = 0xAE;

/// Hooks the VM to a tool's socket.
pub const HOOK: u32 = iow::<Hook>(KVMIO, 0xc8);
/// Ends the introspection of the VM; does nothing if there is none.
pub const UNHOOK: u32 = io(KVMIO, 0xc9);
/// Allows or disallows commands.
pub const COMMAND: u32 = iow::<Feature>(KVMIO, 0xca);
/// Allows or disallows events.
pub const EVENT: u32 = iow::<Feature>(KVMIO, 0xcb);
/// Tells the tool that the VM is about to be unhooked.
pub const PREUNHOOK: u32 = io(KVMIO, 0xcc);

/// Sets how long a vCPU waits for the tool. Not in v12.
pub const EVENT_TIMEOUT: u32 = iow::<EventTimeout>(KVMIO, 0xcd);

/// The capability to ask for with `KVM_CHECK_EXTENSION`; answered with
/// [`crate::wire::VERSION`] when the host module is loaded, else with 0.
///
/// A private number, far above those that mainline will assign.
pub const KVM_CAP_INTROSPECTION: u32 = 0x4b56;

const DIR_WRITE: u32 = 1;
const DIR_READ: u32 = 2;

/// Number of an ioctl without argument.
pub const fn io(ty: u32, nr: u32) -> u32 {
    number(0, ty, nr, 0)
}

/// Number of an ioctl that reads a `T` from the caller.
pub const fn iow<T>(ty: u32, nr: u32) -> u32 {
    number(DIR_WRITE, ty, nr, size_of::<T>())
}

/// Number of an ioctl that reads a `T` from the caller and writes it back.
pub const fn iowr<T>(ty: u32, nr: u32) -> u32 {
    number(DIR_READ | DIR_WRITE, ty, nr, size_of::<T>())
}

const fn number(dir: u32, ty: u32, nr: u32, size: usize) -> u32 {
    assert!(size < 1 << 14, "an ioctl's argument is below 16 KiB");
    dir << 30 | (size as u32) << 16 | ty << 8 | nr
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_numbers_are_those_of_the_protocol() {
        assert_eq!(HOOK, 0x4018_AEC8);
        assert_eq!(UNHOOK, 0x0000_AEC9);
        assert_eq!(COMMAND, 0x4008_AECA);
        assert_eq!(EVENT, 0x4008_AECB);
        assert_eq!(PREUNHOOK, 0x0000_AECC);
        assert_eq!(EVENT_TIMEOUT, 0x4008_AECD);
    }
}
