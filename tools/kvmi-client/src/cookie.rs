// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The secret that VMM and tool may share.

use std::fmt;

use sha1::{Digest as _, Sha1};
use subtle::ConstantTimeEq as _;

/// What the handshake carries of a secret: its SHA-1.
///
/// It keeps a tool from being hooked to a VM by mistake rather than by an attacker, who can replay
/// it; the socket's permissions are what protects it.
#[derive(Clone)]
pub struct Cookie([u8; 20]);

impl Cookie {
    /// The cookie of a secret, taken byte by byte (a line feed at its end counts).
    pub fn of_secret(secret: &[u8]) -> Self {
        Self(Sha1::digest(secret).into())
    }

    /// The hash that the handshake carries.
    pub fn hash(&self) -> [u8; 20] {
        self.0
    }

    /// Whether `hash` is that of this cookie; takes the same time in either case.
    pub fn matches(&self, hash: &[u8; 20]) -> bool {
        self.0.ct_eq(hash).into()
    }
}

impl fmt::Debug for Cookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cookie(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookie_is_the_sha1_of_the_secret() {
        let cookie = Cookie::of_secret(b"abc");
        assert_eq!(cookie.hash()[..4], [0xa9, 0x99, 0x3e, 0x36]);
        assert!(cookie.matches(&Cookie::of_secret(b"abc").hash()));
        assert!(!cookie.matches(&Cookie::of_secret(b"abc\n").hash()));
        assert!(!format!("{cookie:?}").contains("a9"));
    }
}
