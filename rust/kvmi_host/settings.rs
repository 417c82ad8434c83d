// SPDX-License-Identifier: GPL-2.0

//! What a VMM, or an administrator, says about a session.

use kernel::prelude::*;
use kvmi_abi::{
    ioctl::Feature,
    policy::{
        FeatureError,
        MaskChange, //
    },
    Policy, //
};

/// For the VM that gets hooked next.
#[derive(Clone, Copy, Default)]
pub(crate) struct Settings {
    /// What the tool may do.
    pub(crate) policy: Policy,
    /// How long a vCPU waits for the reply to an event, in milliseconds; 0 means for ever, `None`
    /// what the module's parameter says.
    pub(crate) event_timeout_ms: Option<u32>,
    /// Whether the CPU's own accesses to the guest's page tables make PF events.
    pub(crate) page_walks: bool,
}

/// Tells a VMM why a change of an allow mask is refused.
pub(crate) fn feature_errno(error: FeatureError) -> Error {
    match error {
        FeatureError::Invalid => EINVAL,
        FeatureError::AlwaysAllowed => EPERM,
    }
}

/// Checks the argument of a COMMAND ioctl.
pub(crate) fn command_change(feature: &Feature) -> Result<MaskChange> {
    MaskChange::of_commands(feature).map_err(feature_errno)
}

/// Checks the argument of an EVENT ioctl.
pub(crate) fn event_change(feature: &Feature) -> Result<MaskChange> {
    MaskChange::of_events(feature).map_err(feature_errno)
}
