// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Presenting tokens to the host.

use std::{
    os::fd::AsFd,
    thread::sleep,
    time::{Duration, Instant},
};

use kvmi_abi::{
    token::{MapToken, LIFETIME_NS},
    KvmiError,
};
use rustix::io::Errno;

use super::error::{MapError, Result};
use crate::{connection::Connection, error::Error};

/// How long to go on trying. Tokens that somebody did not use have expired by then.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(1);
const LIFETIME: Duration = Duration::from_nanos(LIFETIME_NS);
/// A token that is older than that is not presented any more.
const FRESH: Duration = Duration::from_nanos(LIFETIME_NS / 2);

/// Tokens of one connection. One that was of no use is presented the next time: it is still valid,
/// and there are only eight.
pub(super) struct Tokens {
    writable: bool,
    spare: Option<(MapToken, Instant)>,
}

impl Tokens {
    /// Those by which pages are mapped to be read.
    pub(super) fn read_only() -> Self {
        Self {
            writable: false,
            spare: None,
        }
    }

    /// Those by which pages are mapped to be written, too.
    pub(super) fn writable() -> Self {
        Self {
            writable: true,
            spare: None,
        }
    }

    pub(super) fn are_writable(&self) -> bool {
        self.writable
    }

    /// Has `map` present a token, to map the pages `gpas`, again and again as long as the reason for
    /// a failure is one that passes.
    pub(super) fn present<S: AsFd>(
        &mut self,
        vm: &mut Connection<S>,
        map: impl FnMut(&MapToken) -> rustix::io::Result<()>,
        gpas: &[u64],
    ) -> Result<()> {
        let writable = self.writable;
        let gpa = gpas.first().copied().unwrap_or_default();
        self.try_until(
            Instant::now() + PATIENCE,
            || vm.map_token(writable),
            map,
            gpa,
        )
    }

    fn try_until(
        &mut self,
        deadline: Instant,
        mut issue: impl FnMut() -> crate::Result<MapToken>,
        mut map: impl FnMut(&MapToken) -> rustix::io::Result<()>,
        gpa: u64,
    ) -> Result<()> {
        loop {
            let refusal = match self.take(&mut issue) {
                Ok((token, issued)) => match map(&token) {
                    Ok(()) => return Ok(()),
                    // Maybe it was valid no more, rather than of no use.
                    Err(Errno::NOENT) if issued.elapsed() >= LIFETIME => MapError::Busy(gpa),
                    Err(errno) => {
                        self.spare = Some((token, issued));
                        MapError::of_map(errno, gpa)
                    }
                },
                // There are eight that nobody has used; they will expire.
                Err(Error::Kvmi(KvmiError::Again, _)) => MapError::Busy(gpa),
                Err(error) => return Err(error.into()),
            };
            if !matches!(refusal, MapError::Busy(_)) || Instant::now() >= deadline {
                return Err(refusal);
            }
            sleep(PAUSE);
        }
    }

    /// A token that is valid for some time, and when it was issued.
    fn take(
        &mut self,
        issue: impl FnOnce() -> crate::Result<MapToken>,
    ) -> crate::Result<(MapToken, Instant)> {
        match self.spare.take() {
            Some((token, issued)) if issued.elapsed() < FRESH => Ok((token, issued)),
            _ => {
                // Before it is issued, lest it seems younger than it is.
                let now = Instant::now();
                Ok((issue()?, now))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmi_abi::Command;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    /// Issues tokens with the numbers 1, 2, ….
    fn counter() -> impl FnMut() -> crate::Result<MapToken> {
        let mut count = 0;
        move || {
            count += 1;
            Ok(MapToken { bytes: [count; 32] })
        }
    }

    #[test]
    fn each_success_takes_a_token_of_its_own() {
        let (mut tokens, mut issue, mut seen) = (Tokens::read_only(), counter(), Vec::new());
        for _ in 0..3 {
            let map = |token: &MapToken| {
                seen.push(token.bytes[0]);
                Ok(())
            };
            tokens.try_until(soon(), &mut issue, map, 0).unwrap();
        }
        assert_eq!(seen, [1, 2, 3]);
    }

    #[test]
    fn what_passes_is_tried_again_with_the_same_token() {
        let mut seen = Vec::new();
        let map = |token: &MapToken| {
            seen.push(token.bytes[0]);
            match seen.len() {
                1 => Err(Errno::AGAIN),
                2 => Err(Errno::BUSY),
                _ => Ok(()),
            }
        };
        let mut tokens = Tokens::writable();
        tokens.try_until(soon(), counter(), map, 0).unwrap();
        assert_eq!(seen, [1, 1, 1]);
        assert!(tokens.spare.is_none());
    }

    #[test]
    fn what_does_not_pass_is_told_at_once_and_the_token_is_kept() {
        let (mut tokens, mut issue) = (Tokens::read_only(), counter());
        for (errno, expected) in [
            (Errno::NOENT, "no memory in the pages from 0x1000"),
            (Errno::OPNOTSUPP, "does not let this VM map"),
            (Errno::PERM, "read-only"),
            (Errno::INVAL, "cannot map memory"),
        ] {
            let mut calls = 0;
            let map = |token: &MapToken| {
                calls += 1;
                assert_eq!(token.bytes[0], 1);
                Err(errno)
            };
            let refusal = tokens.try_until(soon(), &mut issue, map, 0x1000);
            let refusal = refusal.unwrap_err().to_string();
            assert!(refusal.contains(expected), "{refusal}");
            assert_eq!(calls, 1);
        }
    }

    #[test]
    fn nobody_waits_for_ever() {
        let mut tokens = Tokens::read_only();
        let busy = tokens.try_until(soon(), counter(), |_| Err(Errno::BUSY), 0x2000);
        assert!(matches!(busy, Err(MapError::Busy(0x2000))));
        let none = || Err(Error::Kvmi(KvmiError::Again, Command::VmGetMapToken));
        let mut tokens = Tokens::read_only();
        let busy = tokens.try_until(soon(), none, |_| Ok(()), 0x2000);
        assert!(matches!(busy, Err(MapError::Busy(0x2000))));
    }

    #[test]
    fn old_tokens_are_not_presented() {
        let mut tokens = Tokens::read_only();
        let old = Instant::now().checked_sub(FRESH).unwrap();
        tokens.spare = Some((MapToken { bytes: [9; 32] }, old));
        let map = |token: &MapToken| {
            assert_eq!(token.bytes[0], 1);
            Ok(())
        };
        tokens.try_until(soon(), counter(), map, 0).unwrap();
    }

    #[test]
    fn host_without_tokens_is_told() {
        let mut tokens = Tokens::read_only();
        let unknown = || Err(Error::Kvmi(KvmiError::NoSys, Command::VmGetMapToken));
        let refusal = tokens.try_until(soon(), unknown, |_| Ok(()), 0);
        assert!(matches!(refusal, Err(MapError::Unsupported)));
        let refusal = tokens.try_until(soon(), || Err(Error::Closed), |_| Ok(()), 0);
        assert!(matches!(refusal, Err(MapError::Connection(Error::Closed))));
    }
}
