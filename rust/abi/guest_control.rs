// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Commands that choose which of a guest's instructions make events; see [`crate::guest_event`].
//!
//! Each needs its event to be allowed. That is looked at first, as for the exceptions that a tool
//! injects.

use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

use crate::{
    command::flag,
    error::KvmiError,
    guest_event::Cr,
    id::Event,
    policy::Policy, //
};

/// Request of `VCPU_CONTROL_CR` (`kvmi_vcpu_control_cr`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ControlCr {
    /// Which control register, see [`Cr`].
    pub cr: u8,
    /// 1 to have writes make events, 0 not to.
    pub enable: u8,
    /// 0.
    pub padding1: u16,
    /// 0.
    pub padding2: u32,
}

impl ControlCr {
    /// Checks the request: which register, and whether to switch its events on.
    pub(crate) fn check(&self, policy: &Policy) -> Result<(Cr, bool), KvmiError> {
        allowed(Event::Cr, policy)?;
        if self.padding1 != 0 || self.padding2 != 0 {
            return Err(KvmiError::Inval);
        }
        let enable = flag(self.enable)?;
        let cr = Cr::from_number(self.cr).ok_or(KvmiError::Inval)?;
        Ok((cr, enable))
    }
}

/// Request of `VCPU_CONTROL_MSR` (`kvmi_vcpu_control_msr`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ControlMsr {
    /// 1 to have writes make events, 0 not to.
    pub enable: u8,
    /// 0.
    pub padding1: u8,
    /// 0.
    pub padding2: u16,
    /// Which MSR, see [`is_controllable_msr`].
    pub msr: u32,
}

impl ControlMsr {
    /// Checks the request: which MSR, and whether to switch its events on.
    pub(crate) fn check(&self, policy: &Policy) -> Result<(u32, bool), KvmiError> {
        allowed(Event::Msr, policy)?;
        if self.padding1 != 0 || self.padding2 != 0 {
            return Err(KvmiError::Inval);
        }
        let enable = flag(self.enable)?;
        if !is_controllable_msr(self.msr) {
            return Err(KvmiError::Inval);
        }
        Ok((self.msr, enable))
    }
}

/// Whether writes to an MSR can make events: it is one of the two ranges that CPUs of both vendors
/// have bits for in their MSR bitmaps, but none of the last branch and exception (LASTBRANCHFROMIP to
/// LASTINTTOIP), which KVM cannot write in the guest's place.
pub const fn is_controllable_msr(msr: u32) -> bool {
    matches!(msr, 0..=0x1fff | 0xc000_0000..=0xc000_1fff) && !matches!(msr, 0x1db..=0x1de)
}

/// Request of `VCPU_CONTROL_SINGLESTEP` (`kvmi_vcpu_control_singlestep`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ControlSinglestep {
    /// 1 to have each instruction make an event, 0 not to.
    pub enable: u8,
    /// 0.
    pub padding: [u8; 7],
}

impl ControlSinglestep {
    /// Checks the request: whether to single-step.
    pub(crate) fn check(&self, policy: &Policy) -> Result<bool, KvmiError> {
        allowed(Event::Singlestep, policy)?;
        if self.padding != [0; 7] {
            return Err(KvmiError::Inval);
        }
        flag(self.enable)
    }
}

fn allowed(event: Event, policy: &Policy) -> Result<(), KvmiError> {
    if policy.allows_event(event) {
        Ok(())
    } else {
        Err(KvmiError::Perm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::Command,
        ioctl::Feature,
        policy::MaskChange,
        vcpu_request::VcpuRequest, //
    };
    use zerocopy::IntoBytes as _;

    /// A policy that allows one event.
    fn only(event: Event) -> Policy {
        let mut policy = Policy::default();
        let feature = Feature {
            allow: 1,
            id: event.id().into(),
        };
        policy.change_events(MaskChange::of_events(&feature).unwrap());
        policy
    }

    fn parse(command: Command, payload: &[u8]) -> Result<VcpuRequest<'_>, KvmiError> {
        let event = match command {
            Command::VcpuControlCr => Event::Cr,
            Command::VcpuControlMsr => Event::Msr,
            _ => Event::Singlestep,
        };
        VcpuRequest::parse(command, payload, &only(event))
    }

    #[test]
    fn requests_are_laid_out_as_the_protocol_says() {
        let cr = ControlCr {
            cr: 4,
            enable: 1,
            ..Default::default()
        };
        assert_eq!(cr.as_bytes(), [4, 1, 0, 0, 0, 0, 0, 0]);
        let msr = ControlMsr {
            enable: 1,
            msr: 0xc000_0082,
            ..Default::default()
        };
        assert_eq!(msr.as_bytes(), [1, 0, 0, 0, 0x82, 0, 0, 0xc0]);
        let step = ControlSinglestep {
            enable: 1,
            ..Default::default()
        };
        assert_eq!(step.as_bytes(), [1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn only_three_control_registers_can_be_chosen() {
        for number in 0..=u8::MAX {
            for enable in [false, true] {
                let expected = Cr::from_number(number)
                    .map(|cr| VcpuRequest::ControlCr { cr, enable })
                    .ok_or(KvmiError::Inval);
                let request = [number, enable.into(), 0, 0, 0, 0, 0, 0];
                assert_eq!(parse(Command::VcpuControlCr, &request), expected);
            }
        }
    }

    #[test]
    fn only_msrs_of_two_ranges_can_be_chosen() {
        for (msr, fine) in [
            (0, true),
            (0x1da, true),
            (0x1db, false),
            (0x1de, false),
            (0x1df, true),
            (0x1fff, true),
            (0x2000, false),
            (0x4b56_4d00, false),
            (0xbfff_ffff, false),
            (0xc000_0000, true),
            (0xc000_1fff, true),
            (0xc000_2000, false),
            (u32::MAX, false),
        ] {
            let control = ControlMsr {
                enable: 1,
                msr,
                ..Default::default()
            };
            let request = VcpuRequest::ControlMsr { msr, enable: true };
            let expected = if fine {
                Ok(request)
            } else {
                Err(KvmiError::Inval)
            };
            let parsed = parse(Command::VcpuControlMsr, control.as_bytes());
            assert_eq!(parsed, expected, "{msr:#x}");
        }
    }

    #[test]
    fn single_steps_are_switched_on_and_off() {
        for (enable, on) in [(0, Ok(false)), (1, Ok(true)), (2, Err(KvmiError::Inval))] {
            let request = [enable];
            let parsed = parse(Command::VcpuControlSinglestep, &request);
            assert_eq!(parsed, on.map(VcpuRequest::ControlSinglestep));
        }
    }

    #[test]
    fn flags_and_padding_are_checked() {
        // Where the flag is, and the padding.
        let cases: [(Command, usize, &[usize]); 3] = [
            (Command::VcpuControlCr, 1, &[2, 3, 4, 5, 6, 7]),
            (Command::VcpuControlMsr, 0, &[1, 2, 3]),
            (Command::VcpuControlSinglestep, 0, &[1, 2, 3, 4, 5, 6, 7]),
        ];
        for (command, flag, padding) in cases {
            assert!(parse(command, &[0; 8]).is_ok(), "{command:?}");
            let bad = padding.iter().map(|at| (*at, 1)).chain([(flag, 2)]);
            for (at, value) in bad {
                let mut request = [0; 8];
                request[at] = value;
                let refused = Err(KvmiError::Inval);
                assert_eq!(parse(command, &request), refused, "{command:?} byte {at}");
            }
        }
    }

    #[test]
    fn the_event_must_be_allowed_whatever_else_is_wrong() {
        for (command, event) in [
            (Command::VcpuControlCr, Event::Cr),
            (Command::VcpuControlMsr, Event::Msr),
            (Command::VcpuControlSinglestep, Event::Singlestep),
        ] {
            let mut policy = only(event);
            let none = Feature { allow: 0, id: -1 };
            policy.change_events(MaskChange::of_events(&none).unwrap());
            for request in [[0; 8], [0xff; 8]] {
                let refused = VcpuRequest::parse(command, &request, &policy);
                assert_eq!(refused, Err(KvmiError::Perm), "{command:?}");
            }
        }
    }
}
