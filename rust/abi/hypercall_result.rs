// SPDX-License-Identifier: GPL-2.0 OR MIT

//! How a guest reads the results of [hypercalls](crate::hypercall).

use crate::{
    error::KvmiError,
    hypercall::EALREADY, //
};

/// Why the host did not do what a hypercall asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HypercallError {
    /// One of the errors of the protocol.
    Kvmi(KvmiError),
    /// The other VM's page, or the one to be replaced, is in use already.
    Already,
    /// Something that is no result of these hypercalls.
    Unknown,
}

impl HypercallError {
    /// What it is called in Linux, as a positive number.
    pub const fn errno(self) -> i32 {
        const EIO: i32 = 5;

        match self {
            // A number that no program knows: the host lacks these hypercalls.
            Self::Kvmi(KvmiError::NoSys) => KvmiError::OpNotSupp.code(),
            // The others are Linux's.
            Self::Kvmi(error) => error.code(),
            Self::Already => EALREADY,
            Self::Unknown => EIO,
        }
    }

    /// Whether the same call may succeed a moment later. The token is not used up.
    pub const fn is_temporary(self) -> bool {
        matches!(
            self,
            Self::Kvmi(KvmiError::Again | KvmiError::Busy | KvmiError::NoMem)
        )
    }

    /// Whether this result of an unmapping says that the page is this VM's own: the host has dropped
    /// the mapping before, for instance because introspection has ended.
    pub const fn says_unmapped(self) -> bool {
        matches!(self, Self::Kvmi(KvmiError::NoEnt))
    }
}

/// Reads the result of a hypercall: a number from 0 to `max`, or an error.
pub fn decode(result: i64, max: usize) -> Result<usize, HypercallError> {
    if let Ok(number) = usize::try_from(result) {
        return if number <= max {
            Ok(number)
        } else {
            Err(HypercallError::Unknown)
        };
    }
    let code = i32::try_from(result.unsigned_abs()).map_err(|_| HypercallError::Unknown)?;
    if code == HypercallError::Already.errno() {
        return Err(HypercallError::Already);
    }
    Err(KvmiError::from_code(code).map_or(HypercallError::Unknown, HypercallError::Kvmi))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_of_the_host_gets_a_name_that_programs_know() {
        for (result, errno) in [
            (-1, 1),
            (-2, 2),
            (-7, 7),
            (-11, 11),
            (-12, 12),
            (-14, 14),
            (-16, 16),
            (-22, 22),
            (-95, 95),
            (-114, 114),
            (-1000, 95),
            // Not of this interface.
            (-3, 5),
            (-5, 5),
            (-4096, 5),
            (i64::MIN, 5),
        ] {
            assert_eq!(
                decode(result, 0).map_err(|e| e.errno()),
                Err(errno),
                "{result}"
            );
        }
    }

    #[test]
    fn a_number_is_not_larger_than_asked_for() {
        assert_eq!(decode(0, 0), Ok(0));
        assert_eq!(decode(1, 0), Err(HypercallError::Unknown));
        assert_eq!(decode(512, 512), Ok(512));
        assert_eq!(decode(513, 512), Err(HypercallError::Unknown));
        assert_eq!(decode(i64::MAX, 512), Err(HypercallError::Unknown));
    }

    #[test]
    fn only_one_error_of_an_unmapping_gives_the_page_back() {
        let unmapped: Vec<i64> = (-2000..0)
            .filter(|&result| decode(result, 0).is_err_and(HypercallError::says_unmapped))
            .collect();
        assert_eq!(unmapped, [-2]);
    }

    #[test]
    fn only_shortages_are_worth_another_try() {
        let temporary: Vec<i64> = (-2000..0)
            .filter(|&result| decode(result, 0).is_err_and(HypercallError::is_temporary))
            .collect();
        assert_eq!(temporary, [-16, -12, -11]);
    }
}
