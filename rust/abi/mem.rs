// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The interface of `/dev/kvmmem`, in a VM whose tools map the memory of other VMs.
//!
//! A page of the calling process is replaced by one of the other VM. It is either a page of a
//! mapping of the device, or an anonymous one. `include/uapi/linux/kvmmem.h` says the same to C.

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

use crate::{
    ioctl::iow,
    token::MapToken, //
};

#[doc(no_inline)]
pub use crate::access::PAGE_SIZE;

/// ioctl type of `/dev/kvmmem`.
pub const KVM_INTRO_IO: u32 = b'i' as u32;

/// Replaces one page: takes a [`MemMap`].
pub const MEM_MAP: u32 = iow::<MemMap>(KVM_INTRO_IO, 1);
/// Undoes that: takes the address of the page, by value.
pub const MEM_UNMAP: u32 = iow::<u64>(KVM_INTRO_IO, 2);
/// [`MEM_UNMAP`] of a 32-bit process: its number depends on the size of C's `long`.
pub const MEM_UNMAP_COMPAT: u32 = iow::<u32>(KVM_INTRO_IO, 2);
/// Replaces pages of a mapping of the device, all or none: takes a [`MemMapMany`].
pub const MEM_MAP_MANY: u32 = iow::<MemMapMany>(KVM_INTRO_IO, 3);
/// Undoes that for every page of a range that is replaced: takes a [`MemUnmapMany`], returns how
/// many there were.
pub const MEM_UNMAP_MANY: u32 = iow::<MemUnmapMany>(KVM_INTRO_IO, 4);

/// Most pages that one token is good for.
pub const MAX_MAP_PAGES: u32 = 256;
/// Most pages of one mapping of the device: 256 MiB. A process may have several mappings.
pub const MAX_AREA_PAGES: usize = 1 << 16;

/// Argument of [`MEM_MAP`] (`kvmi_mem_map`). A token is a secret, hence this has no `Debug`.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemMap {
    /// For the VM that has the page.
    pub token: MapToken,
    /// Guest physical address of the page in that VM, a multiple of [`PAGE_SIZE`].
    pub gpa: u64,
    /// Address of the page to be replaced in the calling process, a multiple of [`PAGE_SIZE`].
    pub gva: u64,
}

/// Argument of [`MEM_MAP_MANY`] (`kvmi_mem_map_many`).
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemMapMany {
    /// For the VM that has the pages.
    pub token: MapToken,
    /// Address of the first page to be replaced, a multiple of [`PAGE_SIZE`]; all of them are in
    /// one mapping of the device.
    pub gva: u64,
    /// Address of an array of `count` guest physical addresses in that VM, as `__u64`.
    pub gpas: u64,
    /// Number of pages, 1 to [`MAX_MAP_PAGES`].
    pub count: u32,
    /// 0.
    pub padding: u32,
}

/// Argument of [`MEM_UNMAP_MANY`] (`kvmi_mem_unmap_many`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MemUnmapMany {
    /// Address of the first page, a multiple of [`PAGE_SIZE`]; all of them are in one mapping of the
    /// device.
    pub gva: u64,
    /// Number of pages, 1 to [`MAX_AREA_PAGES`].
    pub count: u32,
    /// 0.
    pub padding: u32,
}

/// What an ioctl on `/dev/kvmmem` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemIoctl {
    /// Takes the address of a [`MemMap`].
    Map(usize),
    /// Takes the page's address itself.
    Unmap(u64),
    /// Takes the address of a [`MemMapMany`].
    MapMany(usize),
    /// Takes the address of a [`MemUnmapMany`].
    UnmapMany(usize),
}

impl MemIoctl {
    /// The ioctl `cmd` of a 64-bit process with the argument `arg`.
    pub const fn native(cmd: u32, arg: usize) -> Option<Self> {
        match cmd {
            MEM_UNMAP => Some(Self::Unmap(arg as u64)), // CAST: usize has at most 64 bits.
            _ => Self::by_address(cmd, arg),
        }
    }

    /// The ioctl `cmd` of a 32-bit process, of whose argument only 32 bits count.
    pub const fn compat(cmd: u32, arg: usize) -> Option<Self> {
        let arg = arg & 0xffff_ffff;
        match cmd {
            MEM_UNMAP_COMPAT => Some(Self::Unmap(arg as u64)), // CAST: as above.
            _ => Self::by_address(cmd, arg),
        }
    }

    /// Those that are the same for both: no structure has a `long` or padding.
    const fn by_address(cmd: u32, arg: usize) -> Option<Self> {
        match cmd {
            MEM_MAP => Some(Self::Map(arg)),
            MEM_MAP_MANY => Some(Self::MapMany(arg)),
            MEM_UNMAP_MANY => Some(Self::UnmapMany(arg)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_protocol() {
        assert_eq!(MEM_MAP, 0x4030_6901);
        assert_eq!(MEM_UNMAP, 0x4008_6902);
        assert_eq!(MEM_UNMAP_COMPAT, 0x4004_6902);
        assert_eq!(MEM_MAP_MANY, 0x4038_6903);
        assert_eq!(MEM_UNMAP_MANY, 0x4010_6904);
    }

    #[test]
    fn native_and_compat_differ_in_unmap_only() {
        assert_eq!(
            MemIoctl::native(MEM_UNMAP, 0x1000),
            Some(MemIoctl::Unmap(0x1000))
        );
        assert_eq!(MemIoctl::native(MEM_UNMAP_COMPAT, 0x1000), None);
        assert_eq!(MemIoctl::compat(MEM_UNMAP, 0x1000), None);
        for (cmd, expected) in [
            (MEM_MAP, MemIoctl::Map(8)),
            (MEM_MAP_MANY, MemIoctl::MapMany(8)),
            (MEM_UNMAP_MANY, MemIoctl::UnmapMany(8)),
        ] {
            assert_eq!(MemIoctl::native(cmd, 8), Some(expected));
            assert_eq!(MemIoctl::compat(cmd, 8), Some(expected));
        }
        assert_eq!(MemIoctl::native(0, 8), None);
        assert_eq!(MemIoctl::compat(0, 8), None);
    }

    #[test]
    fn compat_arguments_have_32_bits() {
        let arg = 0xdead_beef_8000_1000_u64 as usize;
        assert_eq!(
            MemIoctl::compat(MEM_UNMAP_COMPAT, arg),
            Some(MemIoctl::Unmap(0x8000_1000))
        );
        assert_eq!(
            MemIoctl::compat(MEM_MAP, arg),
            Some(MemIoctl::Map(0x8000_1000))
        );
    }
}
