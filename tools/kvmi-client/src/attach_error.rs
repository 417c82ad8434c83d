// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What can go wrong on the way to a VM.

use std::{io, os::fd::RawFd};

use procfs::ProcError;

use crate::error::Error;

/// Why a VM cannot be found, described or hooked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// `/dev/kvmi` does not exist.
    #[error("/dev/kvmi does not exist")]
    NoModule,
    /// The caller lacks a privilege.
    #[error("no permission to {0}")]
    NotPermitted(&'static str),
    /// No process has this pid.
    #[error("there is no process {0}")]
    NoProcess(i32),
    /// The process has no VM, or not the one asked for.
    #[error("process {0} has no such VM")]
    NoVm(i32),
    /// The process has several VMs.
    #[error("process {pid} has several VMs, with the file descriptors {fds:?}")]
    SeveralVms {
        /// The process.
        pid: i32,
        /// Its file descriptors of VMs.
        fds: Vec<RawFd>,
    },
    /// The VM or its VMM is gone.
    #[error("the VM has gone away")]
    Gone,
    /// Somebody has the VM hooked.
    #[error("the VM is hooked already{}", by.map(|pid| format!(", by process {pid}")).unwrap_or_default())]
    AlreadyHooked {
        /// Who, if known.
        by: Option<i32>,
    },
    /// A VM that cannot be introspected.
    #[error("VMs of this kind (confidential or nesting) cannot be introspected")]
    Unsupported,
    /// An operation of the system failed.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// How it failed.
        source: io::Error,
    },
    /// `/proc` could not be read.
    #[error("cannot read /proc: {0}")]
    Proc(#[from] ProcError),
    /// The new connection failed.
    #[error(transparent)]
    Connection(#[from] Error),
}

impl AttachError {
    /// Makes an error of a failure to do `what`.
    pub(crate) fn system(what: &'static str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        if source.kind() == io::ErrorKind::PermissionDenied {
            Self::NotPermitted(what)
        } else {
            Self::System { what, source }
        }
    }
}
