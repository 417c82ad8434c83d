// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the VMM lets the tool do: the allow masks of commands and events.

use crate::{
    error::KvmiError,
    id::{Command, Event, COMMAND_IDS, EVENT_IDS},
    ioctl::Feature,
};

/// Why a change of an allow mask is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureError {
    /// The request makes no sense.
    Invalid,
    /// The command cannot be disallowed.
    AlwaysAllowed,
}

/// The allow masks of one hooked VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    commands: u32,
    events: u32,
}

impl Default for Policy {
    /// What holds right after hooking: nothing but the commands that are always allowed.
    fn default() -> Self {
        Self {
            commands: Command::ALWAYS_ALLOWED,
            events: 0,
        }
    }
}

/// Bits of all commands of the protocol.
const ALL_COMMANDS: u32 = {
    let mut mask = 0;
    let mut id = 0;
    while id < COMMAND_IDS {
        if let Some(command) = Command::from_id(id) {
            mask |= command.bit();
        }
        id += 1;
    }
    mask
};

/// Bits of all events of the protocol.
const ALL_EVENTS: u32 = {
    let mut mask = 0;
    let mut id = 0;
    while id < EVENT_IDS {
        if let Some(event) = Event::from_id(id) {
            mask |= event.bit();
        }
        id += 1;
    }
    mask
};

/// A change of one mask, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskChange {
    bits: u32,
    allow: bool,
    every_id: bool,
}

impl MaskChange {
    /// Checks the argument of a COMMAND ioctl.
    pub fn of_commands(feature: &Feature) -> Result<Self, FeatureError> {
        Self::new(feature, ALL_COMMANDS)
    }

    /// Checks the argument of an EVENT ioctl.
    pub fn of_events(feature: &Feature) -> Result<Self, FeatureError> {
        Self::new(feature, ALL_EVENTS)
    }

    /// `all` are the bits of the ids that exist: an unknown id is refused, so that no bit of a
    /// mask gets a meaning later that the VMM did not know.
    fn new(feature: &Feature, all: u32) -> Result<Self, FeatureError> {
        let allow = match feature.allow {
            0 => false,
            1 => true,
            _ => return Err(FeatureError::Invalid),
        };
        let every_id = feature.id == -1;
        let bits = if every_id {
            all
        } else {
            u32::try_from(feature.id)
                .ok()
                .and_then(|id| 1u32.checked_shl(id))
                .filter(|bit| all & bit != 0)
                .ok_or(FeatureError::Invalid)?
        };
        Ok(Self {
            bits,
            allow,
            every_id,
        })
    }

    fn apply(self, mask: u32) -> u32 {
        if self.allow {
            mask | self.bits
        } else {
            mask & !self.bits
        }
    }
}

impl Policy {
    /// Changes which commands are allowed.
    pub fn change_commands(&mut self, change: MaskChange) -> Result<(), FeatureError> {
        let protects = change.bits & Command::ALWAYS_ALLOWED != 0;
        if !change.allow && !change.every_id && protects {
            return Err(FeatureError::AlwaysAllowed);
        }
        self.commands = change.apply(self.commands) | Command::ALWAYS_ALLOWED;
        Ok(())
    }

    /// Changes which events are allowed.
    pub fn change_events(&mut self, change: MaskChange) {
        self.events = change.apply(self.events);
    }

    /// Whether the tool may use `command`.
    pub fn allows_command(&self, command: Command) -> bool {
        self.commands & command.bit() != 0
    }

    /// Whether the tool may get `event`.
    pub fn allows_event(&self, event: Event) -> bool {
        self.events & event.bit() != 0
    }

    /// Answers `VM_CHECK_COMMAND`.
    pub fn check_command(&self, id: u16) -> Result<(), KvmiError> {
        let command = Command::from_id(id)
            .filter(|c| c.is_served())
            .ok_or(KvmiError::NoEnt)?;
        if self.allows_command(command) {
            Ok(())
        } else {
            Err(KvmiError::Perm)
        }
    }

    /// Answers `VM_CHECK_EVENT`.
    pub fn check_event(&self, id: u16) -> Result<(), KvmiError> {
        let event = Event::from_id(id)
            .filter(|e| e.is_served())
            .ok_or(KvmiError::NoEnt)?;
        if self.allows_event(event) {
            Ok(())
        } else {
            Err(KvmiError::Perm)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feature(allow: u32, id: i32) -> Feature {
        Feature { allow, id }
    }

    fn commands(allow: u32, id: i32) -> Result<MaskChange, FeatureError> {
        MaskChange::of_commands(&feature(allow, id))
    }

    #[test]
    fn only_three_commands_and_no_event_are_allowed_at_first() {
        let policy = Policy::default();
        let allowed = Command::ALL.iter().filter(|c| policy.allows_command(**c));
        assert_eq!(allowed.count(), 3);
        assert!(!Event::ALL.iter().any(|e| policy.allows_event(*e)));
    }

    #[test]
    fn allow_must_be_zero_or_one_and_the_id_known() {
        assert_eq!(commands(2, 8), Err(FeatureError::Invalid));
        assert_eq!(commands(1, -2), Err(FeatureError::Invalid));
        assert_eq!(commands(1, i32::MIN), Err(FeatureError::Invalid));
        for unknown in [0, 1, 24, 30, 31, 32, 1000, i32::MAX] {
            assert_eq!(commands(1, unknown), Err(FeatureError::Invalid));
        }
        for unknown in [2, 18, 20, 32] {
            let change = MaskChange::of_events(&feature(1, unknown));
            assert_eq!(change, Err(FeatureError::Invalid));
        }
    }

    #[test]
    fn commands_are_allowed_and_disallowed_one_by_one() {
        let mut policy = Policy::default();
        policy.change_commands(commands(1, 12).unwrap()).unwrap();
        assert!(policy.allows_command(Command::VmReadPhysical));
        assert!(!policy.allows_command(Command::VmWritePhysical));
        policy.change_commands(commands(0, 12).unwrap()).unwrap();
        assert!(!policy.allows_command(Command::VmReadPhysical));
    }

    #[test]
    fn always_allowed_commands_stay_so() {
        let mut policy = Policy::default();
        for id in [2, 4, 6] {
            let change = commands(0, id).unwrap();
            assert_eq!(
                policy.change_commands(change),
                Err(FeatureError::AlwaysAllowed)
            );
        }
        policy.change_commands(commands(1, -1).unwrap()).unwrap();
        assert!(Command::ALL.iter().all(|c| policy.allows_command(*c)));
        policy.change_commands(commands(0, -1).unwrap()).unwrap();
        assert_eq!(policy, Policy::default());
    }

    #[test]
    fn check_tells_unknown_from_disallowed() {
        let mut policy = Policy::default();
        assert_eq!(policy.check_command(2), Ok(()));
        assert_eq!(policy.check_command(12), Err(KvmiError::Perm));
        for unknown in [0, 1, 24, 30, 0xffff] {
            assert_eq!(policy.check_command(unknown), Err(KvmiError::NoEnt));
        }
        assert_eq!(policy.check_event(0), Err(KvmiError::Perm));
        policy.change_events(MaskChange::of_events(&feature(1, 0)).unwrap());
        assert_eq!(policy.check_event(0), Ok(()));
        assert_eq!(policy.check_event(2), Err(KvmiError::NoEnt));
    }
}
