// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Lists of commands and of events.

use kvmi_client::{Command, EventId};

/// What a tool is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed<T> {
    /// Everything.
    All,
    /// These only.
    These(Vec<T>),
}

/// Something with an id and a name: a command or an event.
pub trait Named: Copy + 'static {
    /// What the C headers put before the name.
    const PREFIXES: &'static [&'static str];
    /// All of them.
    const ALL: &'static [Self];

    /// Its name.
    fn name(self) -> &'static str;
}

impl Named for Command {
    const PREFIXES: &'static [&'static str] = &["KVMI_"];
    const ALL: &'static [Self] = Command::ALL;

    fn name(self) -> &'static str {
        self.name()
    }
}

impl Named for EventId {
    const PREFIXES: &'static [&'static str] = &["KVMI_VM_EVENT_", "KVMI_VCPU_EVENT_"];
    const ALL: &'static [Self] = EventId::ALL;

    fn name(self) -> &'static str {
        self.name()
    }
}

/// Parses a list of names with commas between them, or "all", or "none".
pub fn parse<T: Named>(text: &str) -> Result<Allowed<T>, String> {
    match text {
        "all" => Ok(Allowed::All),
        "none" => Ok(Allowed::These(Vec::new())),
        list => list
            .split(',')
            .map(named)
            .collect::<Result<_, _>>()
            .map(Allowed::These),
    }
}

fn named<T: Named>(text: &str) -> Result<T, String> {
    let name = text.trim().to_ascii_uppercase().replace('-', "_");
    let name = T::PREFIXES
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .unwrap_or(&name);
    let found = T::ALL.iter().copied().find(|item| item.name() == name);
    found.ok_or_else(|| {
        let known: Vec<_> = T::ALL.iter().map(|item| item.name()).collect();
        format!("there is no {text:?}; known are {}", known.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_with_and_without_their_prefix() {
        let reads = Allowed::These(vec![Command::VmReadPhysical, Command::VmGetInfo]);
        for list in [
            "VM_READ_PHYSICAL,VM_GET_INFO",
            "vm-read-physical, vm-get-info",
            "KVMI_VM_READ_PHYSICAL,KVMI_VM_GET_INFO",
        ] {
            assert_eq!(parse(list).as_ref(), Ok(&reads), "{list}");
        }
        let events = Allowed::These(vec![EventId::Unhook, EventId::Pf]);
        assert_eq!(parse("unhook,KVMI_VCPU_EVENT_PF"), Ok(events));
    }

    #[test]
    fn all_none_and_nonsense() {
        assert_eq!(parse::<Command>("all"), Ok(Allowed::All));
        assert_eq!(parse::<Command>("none"), Ok(Allowed::These(vec![])));
        for bad in ["", "all,none", "VM_EVENT", "VM_READ_PHYSICAL,"] {
            assert!(parse::<Command>(bad).is_err(), "{bad}");
        }
        let error = parse::<EventId>("PAGEFAULT").unwrap_err();
        assert!(
            error.contains("PAGEFAULT") && error.contains("PF"),
            "{error}"
        );
    }
}
