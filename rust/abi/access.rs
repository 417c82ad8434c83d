// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a guest may do with its pages: the command that says so, and the event of an access that is
//! denied.

use zerocopy::FromBytes as _;
use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

use crate::{
    error::KvmiError,
    request::{
        CloseReason,
        Reject, //
    },
    wire::zero_extended, //
};

/// The guest may read, or reads.
pub const R: u8 = 1 << 0;
/// The guest may write, or writes.
pub const W: u8 = 1 << 1;
/// The guest may execute, or executes.
pub const X: u8 = 1 << 2;
/// What the guest may do with an ordinary page.
pub const ALL: u8 = R | W | X;

/// Size of a page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Whether an address is that of a page, a multiple of [`PAGE_SIZE`].
pub const fn is_page_aligned(address: u64) -> bool {
    address % PAGE_SIZE == 0
}

/// The gva of an event whose gva is not known.
pub const GVA_UNKNOWN: u64 = u64::MAX;

/// Most pages that one command can name.
pub const MAX_PAGES: usize =
    (crate::wire::MAX_MSG_SIZE - size_of::<SetPageAccess>()) / size_of::<PageAccess>();

/// Request of `VM_SET_PAGE_ACCESS` (`kvmi_vm_set_page_access`); the pages follow.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SetPageAccess {
    /// Number of pages.
    pub count: u16,
    /// 0.
    pub padding1: u16,
    /// 0.
    pub padding2: u32,
}

/// What the guest may do with one page (`kvmi_page_access_entry`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PageAccess {
    /// Guest physical address of anything in the page.
    pub gpa: u64,
    /// [`R`], [`W`], [`X`].
    pub access: u8,
    /// 0.
    pub padding: [u8; 7],
}

impl PageAccess {
    /// Allows `access` to the page with `gpa`, and denies the rest.
    pub fn new(gpa: u64, access: u8) -> Self {
        Self {
            gpa,
            access,
            padding: [0; 7],
        }
    }

    /// The number of the page.
    pub fn gfn(&self) -> u64 {
        self.gpa / PAGE_SIZE
    }

    /// What is denied, or `None` if the entry makes no sense. Whether it can be denied is for the
    /// caller to find out.
    pub fn denied(&self) -> Option<u8> {
        (self.access & !ALL == 0 && self.padding == [0; 7]).then_some(ALL & !self.access)
    }
}

/// What is specific to a PF event (`kvmi_vcpu_event_pf`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PfEvent {
    /// (Linear) address that the guest uses, or [`GVA_UNKNOWN`].
    pub gva: u64,
    /// Guest physical address.
    pub gpa: u64,
    /// What the guest tries: one of [`R`], [`W`], [`X`].
    pub access: u8,
    /// 0.
    pub padding1: u8,
    /// 0.
    pub padding2: u16,
    /// 0.
    pub padding3: u32,
}

/// The pages that SET_PAGE_ACCESS names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageList<'a>(&'a [u8]);

impl<'a> PageList<'a> {
    /// Takes the payload of a request apart. One that is shorter than it says is not to be
    /// trusted.
    pub(crate) fn parse(payload: &'a [u8]) -> Result<Self, Reject> {
        const TRUNCATED: Reject = Reject::Close(CloseReason::Truncated);
        let head: SetPageAccess = zero_extended(payload);
        let list = payload
            .get(size_of::<SetPageAccess>()..)
            .ok_or(TRUNCATED)?
            .get(..usize::from(head.count) * size_of::<PageAccess>())
            .ok_or(TRUNCATED)?;
        if head.padding1 != 0 || head.padding2 != 0 {
            return Err(KvmiError::Inval.into());
        }
        Ok(Self(list))
    }

    /// The pages, in the order of the request.
    pub fn pages(&self) -> impl Iterator<Item = PageAccess> + 'a {
        self.0
            .chunks_exact(size_of::<PageAccess>())
            .filter_map(|page| PageAccess::read_from_bytes(page).ok())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len() / size_of::<PageAccess>()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes as _;

    fn request(count: u16, pages: &[PageAccess]) -> Vec<u8> {
        let head = SetPageAccess {
            count,
            ..Default::default()
        };
        [head.as_bytes(), pages.as_bytes()].concat()
    }

    #[test]
    fn a_message_holds_511_pages() {
        assert_eq!(MAX_PAGES, 511);
    }

    #[test]
    fn pages_are_listed_in_order_and_surplus_ones_ignored() {
        let pages = [PageAccess::new(0x1000, R), PageAccess::new(0x2fff, R | X)];
        let bytes = request(1, &pages);
        let list = PageList::parse(&bytes).unwrap();
        assert_eq!((list.len(), list.is_empty()), (1, false));
        assert!(list.pages().eq([pages[0]]));

        let bytes = request(2, &pages);
        assert!(PageList::parse(&bytes).unwrap().pages().eq(pages));
        assert_eq!(pages[1].gfn(), 2);
    }

    #[test]
    fn no_page_is_fine() {
        assert!(PageList::parse(&request(0, &[])).unwrap().is_empty());
    }

    #[test]
    fn list_that_is_cut_off_closes_the_connection() {
        let bytes = request(2, &[PageAccess::new(0, R)]);
        for cut in [&bytes[..], &bytes[..23], &bytes[..8], &bytes[..7], &[]] {
            let closed = Err(Reject::Close(CloseReason::Truncated));
            assert_eq!(PageList::parse(cut), closed, "{} bytes", cut.len());
        }
    }

    #[test]
    fn padding_of_the_head_must_be_zero() {
        for byte in 2..8 {
            let mut bytes = request(0, &[]);
            bytes[byte] = 1;
            let refused = Err(Reject::Reply(KvmiError::Inval));
            assert_eq!(PageList::parse(&bytes), refused, "byte {byte}");
        }
    }

    #[test]
    fn page_with_unknown_bits_or_padding_makes_no_sense() {
        assert_eq!(PageAccess::new(0, ALL).denied(), Some(0));
        assert_eq!(PageAccess::new(0, R | X).denied(), Some(W));
        assert_eq!(PageAccess::new(0, 0).denied(), Some(ALL));
        assert_eq!(PageAccess::new(0, 8).denied(), None);
        let mut page = PageAccess::new(0, R);
        page.padding[6] = 1;
        assert_eq!(page.denied(), None);
    }
}
