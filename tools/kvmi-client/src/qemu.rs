// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What QEMU's command line tells about its guest.

use crate::Uuid;

/// What a command line tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// Name of the guest (`-name`).
    pub guest_name: Option<String>,
    /// UUID of the guest (`-uuid`).
    pub uuid: Option<Uuid>,
    /// Memory that the guest starts with, in bytes (`-m`).
    pub memory: Option<u64>,
}

/// Reads the arguments of a process. Those of a VMM that does not know the options tell nothing.
pub fn parse<'a>(arguments: impl IntoIterator<Item = &'a str>) -> CommandLine {
    let mut found = CommandLine::default();
    let mut arguments = arguments.into_iter();
    while let Some(option) = arguments.next() {
        // QEMU takes options with one dash and with two.
        let option = option.strip_prefix("--").or(option.strip_prefix('-'));
        match option {
            Some("name") => found.guest_name = arguments.next().and_then(|v| value(v, "guest")),
            Some("uuid") => found.uuid = arguments.next().and_then(|v| Uuid::parse_str(v).ok()),
            Some("m") => {
                found.memory = arguments
                    .next()
                    .and_then(|v| value(v, "size"))
                    .and_then(|v| memory(&v))
            }
            _ => {}
        }
    }
    found
}

/// The value of `key` in a list of properties, whose first one may come without its key.
fn value(list: &str, key: &str) -> Option<String> {
    properties(list)
        .into_iter()
        .enumerate()
        .find_map(|(index, property)| match property.split_once('=') {
            Some((k, v)) => (k == key).then(|| v.to_owned()),
            None => (index == 0).then_some(property),
        })
        .filter(|value| !value.is_empty())
}

/// Splits a list of properties at its commas; a doubled comma stands for one in a value.
fn properties(list: &str) -> Vec<String> {
    let mut properties = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            properties.push(String::new());
        } else if let Some(property) = properties.last_mut() {
            property.push(c);
        }
    }
    properties
}

/// A size of memory: in MiB unless a suffix says otherwise.
fn memory(size: &str) -> Option<u64> {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match size.get(digits.len()..)?.to_ascii_uppercase().as_str() {
        "B" => 0,
        "K" => 10,
        "" | "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(list: &str) -> Option<String> {
        parse(["qemu", "-name", list]).guest_name
    }

    #[test]
    fn name_may_be_the_first_property_or_that_of_the_guest() {
        assert_eq!(name("web").as_deref(), Some("web"));
        assert_eq!(name("web,debug-threads=on").as_deref(), Some("web"));
        assert_eq!(name("guest=web,debug-threads=on").as_deref(), Some("web"));
        assert_eq!(name("process=x,guest=web").as_deref(), Some("web"));
        assert_eq!(name("guest=a,,b=c,process=x").as_deref(), Some("a,b=c"));
        assert_eq!(name("debug-threads=on"), None);
        assert_eq!(name(""), None);
    }

    #[test]
    fn uuid_and_memory_are_found_among_other_options() {
        let found = parse([
            "qemu-system-x86_64",
            "-nodefaults",
            "--uuid",
            "c9dcf1b0-3b5c-4a2e-9d0e-1f2a3b4c5d6e",
            "-m",
            "size=4G,slots=2,maxmem=8G",
        ]);
        assert_eq!(found.guest_name, None);
        assert!(found.uuid.is_some());
        assert_eq!(found.memory, Some(4 << 30));
    }

    #[test]
    fn memory_is_in_mebibytes_by_default() {
        assert_eq!(memory("512"), Some(512 << 20));
        assert_eq!(memory("64k"), Some(64 << 10));
        assert_eq!(memory("1g"), Some(1 << 30));
        for bad in ["", "G", "1X", "1.5G", "-1", "99999999999999T"] {
            assert_eq!(memory(bad), None, "{bad}");
        }
    }

    #[test]
    fn option_without_value_is_harmless() {
        for option in ["-name", "-uuid", "-m"] {
            assert_eq!(parse(["qemu", option]), CommandLine::default());
        }
        assert_eq!(parse(["x", "-uuid", "nonsense"]), CommandLine::default());
    }
}
