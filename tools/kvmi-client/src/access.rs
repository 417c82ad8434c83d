// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a guest may do with its pages.

use std::{fmt, os::fd::AsFd, str::FromStr};

use bitflags::bitflags;
use kvmi_abi::{
    access::{self, PageAccess, SetPageAccess, MAX_PAGES},
    Command,
};
use zerocopy::IntoBytes as _;

use crate::{
    connection::Connection,
    error::{Error, Result},
};

bitflags! {
    /// Kinds of access to a page: those that a guest is allowed, or the one that it tries.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Access: u8 {
        /// Read.
        const R = access::R;
        /// Write.
        const W = access::W;
        /// Execute.
        const X = access::X;
    }
}

/// The letter of each kind.
const LETTERS: [(Access, char); 3] = [(Access::R, 'r'), (Access::W, 'w'), (Access::X, 'x')];

impl fmt::Display for Access {
    /// As `ls` prints permissions: `r-x`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |(kind, letter)| if self.contains(kind) { letter } else { '-' };
        f.pad(&LETTERS.map(letter).iter().collect::<String>())
    }
}

impl FromStr for Access {
    type Err = String;

    /// Takes letters in any order, such as `wx`; and what [`fmt::Display`] makes.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut access = Self::empty();
        for c in text.chars().filter(|c| *c != '-') {
            let known = LETTERS.iter().find(|(_, letter)| *letter == c);
            let (kind, _) = known.ok_or("expected some of the letters r, w and x")?;
            access |= *kind;
        }
        Ok(access)
    }
}

impl<S: AsFd> Connection<S> {
    /// Says what the guest may do with pages: for each one the guest physical address of anything in
    /// it, and what is allowed from now on. [`Access::all`] is what pages have that nobody named.
    ///
    /// A guest that does something else makes a [`Pf`](crate::VcpuEventKind::Pf) event, on vCPUs
    /// that have it switched on; on others it is permitted. What cannot be enforced by the CPU, such
    /// as to write without reading, is refused with `KVM_EINVAL`, and so is a page without memory.
    ///
    /// One command has room for 511 pages, which change at once; more than that change in several
    /// steps, in the order given. Every page is tried, whether or not others are refused; the error
    /// is that of the first one.
    pub fn set_page_access(
        &mut self,
        pages: impl IntoIterator<Item = (u64, Access)>,
    ) -> Result<()> {
        let entries = pages
            .into_iter()
            .map(|(gpa, access)| PageAccess::new(gpa, access.bits()));
        let entries: Vec<PageAccess> = entries.collect();
        let mut outcome = Ok(());
        for entries in entries.chunks(MAX_PAGES) {
            let request = SetPageAccess {
                count: u16::try_from(entries.len()).map_err(|_| Error::Range)?,
                ..Default::default()
            };
            let parts = [request.as_bytes(), entries.as_bytes()];
            match self.command(Command::VmSetPageAccess, &parts) {
                Ok(_) => {}
                Err(error) if error.is_recoverable() => outcome = outcome.and(Err(error)),
                Err(error) => return Err(error),
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_letters() {
        assert_eq!((Access::R | Access::X).to_string(), "r-x");
        assert_eq!(format!("{:>4}", Access::W), " -w-");
        for (text, access) in [
            ("wx", Access::W | Access::X),
            ("xwr", Access::all()),
            ("r--", Access::R),
            ("", Access::empty()),
        ] {
            assert_eq!(text.parse(), Ok(access), "{text}");
        }
        for bad in ["rwxs", "W", "r w"] {
            assert!(bad.parse::<Access>().is_err(), "{bad}");
        }
    }
}
