// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Which pages a request on `/dev/kvmmem` is about: the arithmetic, checked before anything is done.

use crate::{
    access::{
        is_page_aligned,
        PAGE_SIZE, //
    },
    mem::{
        MemUnmapMany,
        MAX_AREA_PAGES,
        MAX_MAP_PAGES, //
    }, //
};

/// Why an argument of `/dev/kvmmem` is refused. All of these are `EINVAL` to the caller but
/// [`Self::TooMany`], which is `E2BIG`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeError {
    /// An address is not a multiple of the page size.
    Unaligned,
    /// There are no pages in it.
    Empty,
    /// There are more pages in it than may be.
    TooMany,
    /// It goes past the end of the address space.
    Overflow,
    /// A field that must be 0 is not.
    Padding,
}

/// Checks a guest physical address; both ends of a mapping need one that is page aligned.
pub const fn page_address(address: u64) -> Result<u64, RangeError> {
    if is_page_aligned(address) {
        Ok(address)
    } else {
        Err(RangeError::Unaligned)
    }
}

/// Pages that follow one another in an address space.
///
/// The end does not overflow, and `start` is a multiple of [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    start: u64,
    pages: u32,
}

impl PageRange {
    /// `pages` pages from `start` on, at least one and not more than `max`.
    pub const fn new(start: u64, pages: u32, max: u32) -> Result<Self, RangeError> {
        if !is_page_aligned(start) {
            return Err(RangeError::Unaligned);
        }
        if pages == 0 {
            return Err(RangeError::Empty);
        }
        if pages > max {
            return Err(RangeError::TooMany);
        }
        // Cannot overflow: 32 bits times 13.
        match start.checked_add(pages as u64 * PAGE_SIZE) {
            Some(_) => Ok(Self { start, pages }),
            None => Err(RangeError::Overflow),
        }
    }

    /// The page at `address`.
    pub const fn page(address: u64) -> Result<Self, RangeError> {
        Self::new(address, 1, 1)
    }

    /// What [`MEM_MAP_MANY`](crate::mem::MEM_MAP_MANY) is about.
    pub const fn to_map(gva: u64, count: u32, padding: u32) -> Result<Self, RangeError> {
        if padding != 0 {
            return Err(RangeError::Padding);
        }
        Self::new(gva, count, MAX_MAP_PAGES)
    }

    /// What [`MEM_UNMAP_MANY`](crate::mem::MEM_UNMAP_MANY) is about.
    pub const fn to_unmap(request: &MemUnmapMany) -> Result<Self, RangeError> {
        if request.padding != 0 {
            return Err(RangeError::Padding);
        }
        // CAST: it is 65536.
        Self::new(request.gva, request.count, MAX_AREA_PAGES as u32)
    }

    /// Address of the first page.
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Number of pages.
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// Address behind the last page.
    pub const fn end(&self) -> u64 {
        self.start + self.pages as u64 * PAGE_SIZE
    }

    /// The page of `self` at which `inner` begins, if all of `inner` is in `self`.
    pub const fn index_of(&self, inner: &Self) -> Option<u32> {
        if inner.start < self.start || inner.end() > self.end() {
            return None;
        }
        // CAST: less than `self.pages`.
        Some(((inner.start - self.start) / PAGE_SIZE) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOP: u64 = u64::MAX - PAGE_SIZE + 1;

    #[test]
    fn addresses_are_page_aligned() {
        assert_eq!(page_address(0), Ok(0));
        assert_eq!(page_address(0x5000), Ok(0x5000));
        for address in [1, 0xfff, 0x1001, u64::MAX] {
            assert_eq!(page_address(address), Err(RangeError::Unaligned));
            assert_eq!(PageRange::page(address), Err(RangeError::Unaligned));
        }
    }

    #[test]
    fn counts_are_limited() {
        assert_eq!(PageRange::to_map(0, 0, 0), Err(RangeError::Empty));
        assert!(PageRange::to_map(0, 1, 0).is_ok());
        assert!(PageRange::to_map(0, 256, 0).is_ok());
        assert_eq!(PageRange::to_map(0, 257, 0), Err(RangeError::TooMany));
        assert_eq!(PageRange::to_map(0, u32::MAX, 0), Err(RangeError::TooMany));
        assert_eq!(PageRange::to_map(0, 1, 1), Err(RangeError::Padding));

        let unmap = |count, padding| {
            PageRange::to_unmap(&MemUnmapMany {
                gva: 0x1000,
                count,
                padding,
            })
        };
        assert_eq!(unmap(0, 0), Err(RangeError::Empty));
        assert!(unmap(65536, 0).is_ok());
        assert_eq!(unmap(65537, 0), Err(RangeError::TooMany));
        assert_eq!(unmap(1, 2), Err(RangeError::Padding));
    }

    #[test]
    fn no_range_wraps_around() {
        assert_eq!(PageRange::page(TOP), Err(RangeError::Overflow));
        assert!(PageRange::page(TOP - PAGE_SIZE).is_ok());
        assert_eq!(PageRange::new(TOP, 2, 2), Err(RangeError::Overflow));
        assert_eq!(
            PageRange::new(PAGE_SIZE, u32::MAX, u32::MAX).map(|r| r.end()),
            Ok(1 << 44)
        );
    }

    #[test]
    fn a_range_knows_where_another_one_is_in_it() {
        let area = PageRange::new(0x10000, 4, 4).unwrap();
        let index = |start, pages| area.index_of(&PageRange::new(start, pages, 16).unwrap());
        assert_eq!(index(0x10000, 1), Some(0));
        assert_eq!(index(0x10000, 4), Some(0));
        assert_eq!(index(0x13000, 1), Some(3));
        assert_eq!(index(0x13000, 2), None);
        assert_eq!(index(0xf000, 1), None);
        assert_eq!(index(0xf000, 6), None);
        assert_eq!(index(0x14000, 1), None);
    }
}
