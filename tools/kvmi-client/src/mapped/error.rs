// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What can go wrong with mapped memory.

use std::io;

use kvmi_abi::{Command, KvmiError};
use rustix::io::Errno;

use crate::error::Error;

/// Result of an operation on mapped memory.
pub type Result<T> = std::result::Result<T, MapError>;

/// Why memory of a VM cannot be mapped, or accessed there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// `/dev/kvmmem` does not exist.
    #[error("/dev/kvmmem does not exist")]
    NoDevice,
    /// The caller must not open `/dev/kvmmem`.
    #[error("no permission to open /dev/kvmmem")]
    NotPermitted,
    /// A window of this many pages cannot be had.
    #[error("cannot get a window of {pages} pages: {source}")]
    NoWindow {
        /// How many.
        pages: usize,
        /// Why.
        source: io::Error,
    },
    /// The host does not know tokens.
    #[error("the host cannot map memory of one VM into another")]
    Unsupported,
    /// The host does not serve the hypercalls that map pages, for this VM or at all.
    #[error("the host does not let this VM map memory of others")]
    NotIntrospector,
    /// The VM has no memory at one of these addresses, or the host does not accept the token, which
    /// it says in the same way.
    #[error("the VM has no memory in the pages from {0:#x} on, or the host refuses the token")]
    Absent(u64),
    /// Memory that is to be written to is read-only for the VM itself.
    #[error("memory in the pages from {0:#x} on is read-only")]
    NotWritable(u64),
    /// Something else was under way for too long.
    #[error("the pages from {0:#x} on could not be mapped in time")]
    Busy(u64),
    /// There is no room in the window.
    #[error("the window has no room for {0} pages in a row")]
    Full(usize),
    /// The mapping is one to be read only.
    #[error("the mapping is read-only")]
    ReadOnly,
    /// Addresses that are not mapped, or do not exist, or none at all.
    #[error("the range is empty, or beyond what is mapped or exists")]
    Range,
    /// An operation of the system failed.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// How it failed.
        source: io::Error,
    },
    /// The connection failed, or the host issued no token.
    #[error(transparent)]
    Connection(Error),
}

impl MapError {
    /// Why the device could not be opened.
    pub(super) fn of_open(error: io::Error) -> Self {
        match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NXIO | Errno::NODEV) => Self::NoDevice,
            Some(Errno::ACCESS | Errno::PERM) => Self::NotPermitted,
            _ => Self::System {
                what: "open /dev/kvmmem",
                source: error,
            },
        }
    }

    /// Why the pages from `gpa` on could not be mapped.
    pub(super) fn of_map(errno: Errno, gpa: u64) -> Self {
        match errno {
            Errno::OPNOTSUPP => Self::NotIntrospector,
            Errno::NOENT => Self::Absent(gpa),
            Errno::PERM => Self::NotWritable(gpa),
            Errno::AGAIN | Errno::BUSY => Self::Busy(gpa),
            _ => Self::System {
                what: "map memory of the VM",
                source: errno.into(),
            },
        }
    }
}

impl From<Error> for MapError {
    fn from(error: Error) -> Self {
        match error {
            Error::Kvmi(KvmiError::NoSys, Command::VmGetMapToken) => Self::Unsupported,
            error => Self::Connection(error),
        }
    }
}
