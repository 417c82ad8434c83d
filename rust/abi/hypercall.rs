// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The hypercalls by which the guest of an introspector maps pages of another VM.
//!
//! They follow KVM's convention: the number in RAX, arguments in RBX, RCX, RDX, RSI, the result in
//! RAX, 0 or more, or a negative error. The caller has to be in kernel mode, and its VM has to be
//! one that the administrator has made an introspector; for others KVM knows no such call
//! (`KVM_ENOSYS`).

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

use crate::{
    access::{
        is_page_aligned,
        PAGE_SIZE, //
    },
    error::KvmiError, //
};

/// Maps one page: virtual address of a token, gpa in the target, own gpa.
pub const MEM_MAP: u32 = 32;
/// Unmaps one page: own gpa.
pub const MEM_UNMAP: u32 = 33;
/// Maps many pages or none: virtual address of a token, gpa of a page with an array of
/// [`MapEntry`], their number.
pub const MEM_MAP_MANY: u32 = 35;
/// Unmaps many pages: gpa of a page with an array of own gpas, their number. The result is how
/// many from the first one on are unmapped.
pub const MEM_UNMAP_MANY: u32 = 36;

/// The page is, or is not, mapped already (`EALREADY`). The protocol of the socket has no such
/// error.
pub const EALREADY: i32 = 114;

/// An array fills a page at most.
pub const ARRAY_SIZE: usize = PAGE_SIZE as usize; // CAST: it is 4096.

/// A page to be mapped (`kvmi_map_entry`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MapEntry {
    /// Where the page is in the target.
    pub target_gpa: u64,
    /// Which page of the caller's is to stand for it.
    pub gpa: u64,
}

/// How many pages one call maps.
pub const MAX_MAP: usize = ARRAY_SIZE / size_of::<MapEntry>();
/// How many pages one call unmaps.
pub const MAX_UNMAP: usize = ARRAY_SIZE / size_of::<u64>();

/// A hypercall with arguments that make sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hypercall {
    /// [`MEM_MAP`]
    Map {
        /// Virtual address of the token.
        token_gva: u64,
        /// The page.
        entry: MapEntry,
    },
    /// [`MEM_UNMAP`]
    Unmap {
        /// The page.
        gpa: u64,
    },
    /// [`MEM_MAP_MANY`]
    MapMany {
        /// Virtual address of the token.
        token_gva: u64,
        /// Where the array is.
        array_gpa: u64,
        /// Entries, 1 to [`MAX_MAP`].
        count: usize,
    },
    /// [`MEM_UNMAP_MANY`]
    UnmapMany {
        /// Where the array is.
        array_gpa: u64,
        /// Entries, 1 to [`MAX_UNMAP`].
        count: usize,
    },
}

impl Hypercall {
    /// Makes sense of a call; nothing if it is somebody else's. Fails with `Perm` if the caller is
    /// not privileged, `Inval` if an address is no page's, `TooBig` if there are too many.
    pub fn parse(nr: u64, args: &[u64; 4], cpl: u32) -> Option<Result<Self, KvmiError>> {
        let [a0, a1, a2, _] = *args;
        let call = match u32::try_from(nr).ok()? {
            MEM_MAP => page(a1).and_then(|target_gpa| {
                Ok(Self::Map {
                    token_gva: a0,
                    entry: MapEntry {
                        target_gpa,
                        gpa: page(a2)?,
                    },
                })
            }),
            MEM_UNMAP => page(a0).map(|gpa| Self::Unmap { gpa }),
            MEM_MAP_MANY => page(a1).and_then(|array_gpa| {
                Ok(Self::MapMany {
                    token_gva: a0,
                    array_gpa,
                    count: count(a2, MAX_MAP)?,
                })
            }),
            MEM_UNMAP_MANY => page(a0).and_then(|array_gpa| {
                Ok(Self::UnmapMany {
                    array_gpa,
                    count: count(a1, MAX_UNMAP)?,
                })
            }),
            _ => return None,
        };
        if cpl != 0 {
            return Some(Err(KvmiError::Perm));
        }
        Some(call)
    }
}

impl MapEntry {
    /// Checks that both addresses are pages'.
    pub fn check(&self) -> Result<(), KvmiError> {
        page(self.target_gpa)?;
        page(self.gpa)?;
        Ok(())
    }
}

/// Checks that an address is a page's.
fn page(gpa: u64) -> Result<u64, KvmiError> {
    if is_page_aligned(gpa) {
        Ok(gpa)
    } else {
        Err(KvmiError::Inval)
    }
}

fn count(count: u64, max: usize) -> Result<usize, KvmiError> {
    match usize::try_from(count) {
        Ok(0) => Err(KvmiError::Inval),
        Ok(count) if count <= max => Ok(count),
        _ => Err(KvmiError::TooBig),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(nr: u64, args: [u64; 3]) -> Option<Result<Hypercall, KvmiError>> {
        Hypercall::parse(nr, &[args[0], args[1], args[2], 0xdead], 0)
    }

    #[test]
    fn pages_are_mapped_and_unmapped_by_aligned_addresses() {
        let entry = MapEntry {
            target_gpa: 0x5000,
            gpa: 0x7000,
        };
        let map = Hypercall::Map {
            token_gva: 0x123,
            entry,
        };
        assert_eq!(parse(32, [0x123, 0x5000, 0x7000]), Some(Ok(map)));
        assert_eq!(parse(32, [0, 0x5001, 0x7000]), Some(Err(KvmiError::Inval)));
        assert_eq!(parse(32, [0, 0x5000, 0x7fff]), Some(Err(KvmiError::Inval)));
        let unmap = Hypercall::Unmap { gpa: 0x7000 };
        assert_eq!(parse(33, [0x7000, 1, 1]), Some(Ok(unmap)));
        assert_eq!(parse(33, [0x7010, 0, 0]), Some(Err(KvmiError::Inval)));
    }

    #[test]
    fn one_token_is_good_for_what_the_guest_is_told() {
        assert_eq!(u32::try_from(MAX_MAP), Ok(crate::mem::MAX_MAP_PAGES));
    }

    #[test]
    fn arrays_fit_into_a_page() {
        let many = Hypercall::MapMany {
            token_gva: 9,
            array_gpa: 0x1000,
            count: 256,
        };
        assert_eq!(parse(35, [9, 0x1000, 256]), Some(Ok(many)));
        for (count, error) in [
            (0, KvmiError::Inval),
            (257, KvmiError::TooBig),
            (u64::MAX, KvmiError::TooBig),
        ] {
            assert_eq!(parse(35, [9, 0x1000, count]), Some(Err(error)));
        }
        let many = Hypercall::UnmapMany {
            array_gpa: 0x1000,
            count: 512,
        };
        assert_eq!(parse(36, [0x1000, 512, 0]), Some(Ok(many)));
        assert_eq!(parse(36, [0x1000, 513, 0]), Some(Err(KvmiError::TooBig)));
        assert_eq!(parse(36, [0x1008, 1, 0]), Some(Err(KvmiError::Inval)));
    }

    #[test]
    fn only_a_kernel_may_call() {
        for nr in [32, 33, 35, 36] {
            let refused = Hypercall::parse(nr, &[0; 4], 3);
            assert_eq!(refused, Some(Err(KvmiError::Perm)));
        }
    }

    #[test]
    fn other_calls_are_not_ours() {
        for nr in [0, 1, 12, 31, 34, 37, 1 << 32 | 32] {
            assert_eq!(Hypercall::parse(nr, &[0; 4], 0), None);
        }
    }
}
