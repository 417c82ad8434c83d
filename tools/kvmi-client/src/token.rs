// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tokens by which a tool's own VM maps pages of the VM that the tool looks into.

use std::os::fd::AsFd;

use kvmi_abi::{
    token::{GetMapToken, MapToken, TOKEN_READ_ONLY},
    Command,
};
use zerocopy::IntoBytes as _;

use crate::{connection::Connection, error::Result};

impl<S: AsFd> Connection<S> {
    /// Gets a token with which the guest of an introspector maps pages of this VM: once, within
    /// three seconds. `writable` says whether the pages may be written to there.
    ///
    /// Fails with `KVM_EAGAIN` if there are eight tokens that nobody has used yet.
    pub fn map_token(&mut self, writable: bool) -> Result<MapToken> {
        let request = GetMapToken {
            flags: if writable { 0 } else { TOKEN_READ_ONLY },
            padding: 0,
        };
        let data = self.command(Command::VmGetMapToken, &[request.as_bytes()])?;
        self.decode(&data)
    }
}
