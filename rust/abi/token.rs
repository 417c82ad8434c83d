// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tokens: what a tool passes to its own VM so that this may map pages of the VM that is
//! introspected.
//!
//! A token is good for one call that maps pages, within [`LIFETIME_NS`]. It belongs to the session
//! that has issued it, and ends with it.

use core::hint::black_box;

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

use crate::{
    error::KvmiError,
    wire::zero_extended, //
};

/// Bytes of a token, all of them random.
pub const TOKEN_SIZE: usize = 32;
/// How many tokens of a session there may be at a time.
pub const MAX_TOKENS: usize = 8;
/// How long a token is valid, in ns.
pub const LIFETIME_NS: u64 = 3_000_000_000;

/// The pages that are mapped with the token can be read only.
pub const TOKEN_READ_ONLY: u32 = 1 << 0;

/// Request of `VM_GET_MAP_TOKEN` (`kvmi_vm_get_map_token`), which may be left out.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GetMapToken {
    /// 0 or [`TOKEN_READ_ONLY`].
    pub flags: u32,
    /// 0.
    pub padding: u32,
}

impl GetMapToken {
    /// Checks a request; returns whether pages may be written to.
    pub fn parse(payload: &[u8]) -> Result<bool, KvmiError> {
        let request: Self = zero_extended(payload);
        match (request.flags, request.padding) {
            (0, 0) => Ok(true),
            (TOKEN_READ_ONLY, 0) => Ok(false),
            _ => Err(KvmiError::Inval),
        }
    }
}

/// Reply to `VM_GET_MAP_TOKEN` (`kvmi_vm_get_map_token_reply`). Not printable: it is a secret.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MapToken {
    /// The token.
    pub bytes: [u8; TOKEN_SIZE],
}

impl MapToken {
    /// Compares in a time that does not depend on the tokens.
    fn is(&self, other: &Self) -> bool {
        let pairs = self.bytes.iter().zip(&other.bytes);
        black_box(pairs.fold(0, |all, (a, b)| all | (a ^ b))) == 0
    }

    /// Overwrites the token.
    pub fn wipe(&mut self) {
        self.bytes = [0; TOKEN_SIZE];
        // Nobody reads it any more, but somebody might find it.
        black_box(&self.bytes);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// Waits to be presented.
    Issued,
    /// Is being used.
    Presented,
}

#[derive(Clone, Copy)]
struct Slot {
    state: State,
    token: MapToken,
    writable: bool,
    /// On the same clock as `now` of all methods, in ns.
    deadline: u64,
}

impl Slot {
    const FREE: Self = Self {
        state: State::Free,
        token: MapToken {
            bytes: [0; TOKEN_SIZE],
        },
        writable: false,
        deadline: 0,
    };

    fn free(&mut self) {
        self.token.wipe();
        *self = Self::FREE;
    }
}

/// A token that is being used, until it is [taken back](TokenTable::take_back) or
/// [consumed](TokenTable::consume).
#[derive(Debug, PartialEq, Eq)]
pub struct Presented {
    slot: usize,
    /// Whether pages may be written to.
    pub writable: bool,
}

/// The tokens of a session.
pub struct TokenTable {
    slots: [Slot; MAX_TOKENS],
    closed: bool,
}

impl Default for TokenTable {
    fn default() -> Self {
        Self::new()
    }
}

impl TokenTable {
    /// Creates an empty table.
    pub const fn new() -> Self {
        Self {
            slots: [Slot::FREE; MAX_TOKENS],
            closed: false,
        }
    }

    /// Enters a token. Fails with `Again` if there are too many.
    pub fn issue(&mut self, token: MapToken, writable: bool, now: u64) -> Result<(), KvmiError> {
        self.expire(now);
        let free = self.slots.iter_mut().find(|s| s.state == State::Free);
        let slot = free.filter(|_| !self.closed).ok_or(KvmiError::Again)?;
        *slot = Slot {
            state: State::Issued,
            token,
            writable,
            deadline: now.saturating_add(LIFETIME_NS),
        };
        Ok(())
    }

    /// Finds the token that somebody has presented, so that nobody else can use it meanwhile.
    pub fn present(&mut self, token: &MapToken, now: u64) -> Option<Presented> {
        let mut found = None;
        for (at, slot) in self.slots.iter().enumerate() {
            let usable = slot.state == State::Issued && now < slot.deadline;
            // All of them are compared: the time tells nothing.
            if slot.token.is(token) && usable {
                found = Some(at);
            }
        }
        let slot = self.slots.get_mut(found?)?;
        slot.state = State::Presented;
        Some(Presented {
            slot: found?,
            writable: slot.writable,
        })
    }

    /// Has a token be valid again that was of no use.
    pub fn take_back(&mut self, presented: Presented, now: u64) {
        if let Some(slot) = self.presented(&presented) {
            slot.state = State::Issued;
        }
        self.expire(now);
    }

    /// Ends a token that has been used.
    pub fn consume(&mut self, presented: Presented) {
        if let Some(slot) = self.presented(&presented) {
            slot.free();
        }
    }

    fn presented(&mut self, presented: &Presented) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(presented.slot)?;
        (slot.state == State::Presented).then_some(slot)
    }

    /// Ends what has become too old. Returns when that has to be done again, if ever.
    pub fn expire(&mut self, now: u64) -> Option<u64> {
        let mut next = None;
        for slot in self.slots.iter_mut().filter(|s| s.state != State::Free) {
            // One that is being used may be taken back, and has to be looked at again.
            if slot.deadline <= now && slot.state == State::Issued {
                slot.free();
            } else if slot.deadline > now {
                next = Some(next.map_or(slot.deadline, |next| slot.deadline.min(next)));
            }
        }
        next
    }

    /// Whether there are no tokens any more.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Ends all tokens, those that are being used included, and issues no more.
    pub fn close(&mut self) {
        self.closed = true;
        self.slots.iter_mut().for_each(Slot::free);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes as _;

    fn token(seed: u8) -> MapToken {
        MapToken {
            bytes: [seed; TOKEN_SIZE],
        }
    }

    #[test]
    fn request_may_be_left_out_and_asks_for_write_access_then() {
        assert_eq!(GetMapToken::parse(&[]), Ok(true));
        assert_eq!(GetMapToken::parse(&[1, 0, 0, 0]), Ok(false));
        for (flags, padding) in [(2, 0), (3, 0), (0, 1), (1 << 31, 0)] {
            let request = GetMapToken { flags, padding };
            let refused = GetMapToken::parse(request.as_bytes());
            assert_eq!(refused, Err(KvmiError::Inval));
        }
    }

    #[test]
    fn token_is_good_for_one_use() {
        let mut table = TokenTable::new();
        table.issue(token(1), true, 0).unwrap();
        table.issue(token(2), false, 0).unwrap();
        assert_eq!(table.present(&token(3), 1), None);
        let presented = table.present(&token(2), 1).unwrap();
        assert!(!presented.writable);
        assert_eq!(table.present(&token(2), 1), None, "it is in use");
        table.consume(presented);
        assert_eq!(table.present(&token(2), 1), None);
        assert!(table.present(&token(1), 1).unwrap().writable);
    }

    #[test]
    fn token_that_was_of_no_use_stays_valid_until_its_time_is_over() {
        let mut table = TokenTable::new();
        table.issue(token(1), true, 10).unwrap();
        let presented = table.present(&token(1), 11).unwrap();
        table.take_back(presented, 12);
        let presented = table.present(&token(1), 10 + LIFETIME_NS - 1).unwrap();
        table.take_back(presented, 10 + LIFETIME_NS);
        assert_eq!(table.present(&token(1), 11), None);
    }

    #[test]
    fn token_expires_to_the_nanosecond() {
        let mut table = TokenTable::new();
        table.issue(token(1), true, 5).unwrap();
        table.issue(token(2), true, 7).unwrap();
        assert_eq!(table.expire(LIFETIME_NS), Some(LIFETIME_NS + 5));
        assert_eq!(table.present(&token(1), LIFETIME_NS + 5), None);
        assert_eq!(table.expire(LIFETIME_NS + 5), Some(LIFETIME_NS + 7));
        assert_eq!(table.expire(LIFETIME_NS + 7), None);
    }

    #[test]
    fn token_that_is_being_used_is_looked_at_when_its_time_is_over() {
        let mut table = TokenTable::new();
        table.issue(token(1), true, 5).unwrap();
        let presented = table.present(&token(1), 6).unwrap();
        assert_eq!(table.expire(7), Some(LIFETIME_NS + 5));
        assert_eq!(table.expire(LIFETIME_NS + 5), None);
        table.take_back(presented, LIFETIME_NS + 6);
        assert_eq!(table.expire(LIFETIME_NS + 6), None);
        for seed in 2..10 {
            assert_eq!(table.issue(token(seed), true, LIFETIME_NS + 7), Ok(()));
        }
    }

    #[test]
    fn there_are_eight_tokens_and_no_more() {
        let mut table = TokenTable::new();
        for seed in 1..=8 {
            assert_eq!(table.issue(token(seed), true, 0), Ok(()));
        }
        assert_eq!(table.issue(token(9), true, 1), Err(KvmiError::Again));
        // One in use is one of them.
        let presented = table.present(&token(4), 1).unwrap();
        assert_eq!(table.issue(token(9), true, 1), Err(KvmiError::Again));
        table.consume(presented);
        assert_eq!(table.issue(token(9), true, 1), Ok(()));
        assert_eq!(table.issue(token(10), true, 1), Err(KvmiError::Again));
        // All but the last one expire.
        assert_eq!(table.issue(token(10), true, LIFETIME_NS), Ok(()));
        assert!(table.present(&token(9), LIFETIME_NS).is_some());
        assert!(table.present(&token(1), LIFETIME_NS).is_none());
    }

    #[test]
    fn zeros_are_no_token() {
        let mut table = TokenTable::new();
        table.issue(token(1), true, 0).unwrap();
        assert_eq!(table.present(&token(0), 1), None);
    }

    #[test]
    fn closed_table_has_no_tokens() {
        let mut table = TokenTable::new();
        table.issue(token(1), true, 0).unwrap();
        table.issue(token(2), true, 0).unwrap();
        let presented = table.present(&token(1), 1).unwrap();
        assert!(!table.is_closed());
        table.close();
        assert!(table.is_closed());
        table.take_back(presented, 1);
        assert_eq!(table.present(&token(1), 1), None);
        assert_eq!(table.present(&token(2), 1), None);
        assert_eq!(table.issue(token(3), true, 1), Err(KvmiError::Again));
        assert_eq!(table.expire(1), None);
    }
}
