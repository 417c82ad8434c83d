// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Error numbers of the protocol.

use core::fmt;

/// Why a command failed, as told to the tool.
///
/// The numbers are those of `linux/kvm_para.h` plus four that the protocol adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmiError {
    /// The VMM does not allow this.
    Perm,
    /// There is no such thing.
    NoEnt,
    /// An argument list is too long.
    TooBig,
    /// The vCPU cannot be used yet.
    Again,
    /// The host is out of memory.
    NoMem,
    /// Memory could not be accessed.
    Fault,
    /// In conflict with something in progress.
    Busy,
    /// An argument, padding included, is wrong.
    Inval,
    /// Not possible on this host, or not now.
    OpNotSupp,
    /// Unknown message.
    NoSys,
}

impl KvmiError {
    /// Every error of the protocol.
    pub const ALL: [Self; 10] = [
        Self::Perm,
        Self::NoEnt,
        Self::TooBig,
        Self::Again,
        Self::NoMem,
        Self::Fault,
        Self::Busy,
        Self::Inval,
        Self::OpNotSupp,
        Self::NoSys,
    ];

    /// The (positive) number of this error; it is sent negated.
    pub const fn code(self) -> i32 {
        match self {
            Self::Perm => 1,
            Self::NoEnt => 2,
            Self::TooBig => 7,
            Self::Again => 11,
            Self::NoMem => 12,
            Self::Fault => 14,
            Self::Busy => 16,
            Self::Inval => 22,
            Self::OpNotSupp => 95,
            Self::NoSys => 1000,
        }
    }

    /// The error with the (positive) number `code`.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.code() == code)
    }

    /// The name of this error in the C headers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Perm => "KVM_EPERM",
            Self::NoEnt => "KVM_ENOENT",
            Self::TooBig => "KVM_E2BIG",
            Self::Again => "KVM_EAGAIN",
            Self::NoMem => "KVM_ENOMEM",
            Self::Fault => "KVM_EFAULT",
            Self::Busy => "KVM_EBUSY",
            Self::Inval => "KVM_EINVAL",
            Self::OpNotSupp => "KVM_EOPNOTSUPP",
            Self::NoSys => "KVM_ENOSYS",
        }
    }
}

impl fmt::Display for KvmiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_is_found_by_its_number() {
        for e in KvmiError::ALL {
            assert_eq!(KvmiError::from_code(e.code()), Some(e));
        }
        assert_eq!(KvmiError::from_code(0), None);
        assert_eq!(KvmiError::from_code(-1), None);
    }
}
