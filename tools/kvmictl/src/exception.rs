// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The exceptions of x86.

use std::fmt;

use kvmi_client::VcpuEventKind;

use crate::number;

/// Vector of an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector(pub u8);

/// Vector of page faults.
const PAGE_FAULT: u8 = 14;

/// Vectors are below this.
const VECTORS: u8 = 32;

/// The exceptions: name, vector, whether they have an error code.
const EXCEPTIONS: [(&str, u8, bool); 22] = [
    ("DE", 0, false),
    ("DB", 1, false),
    ("BP", 3, false),
    ("OF", 4, false),
    ("BR", 5, false),
    ("UD", 6, false),
    ("NM", 7, false),
    ("DF", 8, true),
    ("TS", 10, true),
    ("NP", 11, true),
    ("SS", 12, true),
    ("GP", 13, true),
    ("PF", PAGE_FAULT, true),
    ("MF", 16, false),
    ("AC", 17, true),
    ("MC", 18, false),
    ("XM", 19, false),
    ("VE", 20, false),
    ("CP", 21, true),
    ("HV", 28, false),
    ("VC", 29, true),
    ("SX", 30, true),
];

/// Parses a vector, or the name of an exception.
pub fn parse(text: &str) -> Result<Vector, String> {
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        let number = number::parse(text)?;
        return u8::try_from(number)
            .ok()
            .filter(|vector| *vector < VECTORS)
            .map(Vector)
            .ok_or_else(|| format!("vectors of exceptions are below {VECTORS}"));
    }
    let name = text.trim_start_matches('#').to_ascii_uppercase();
    let known = EXCEPTIONS.iter().find(|(known, ..)| *known == name);
    known
        .map(|(_, vector, _)| Vector(*vector))
        .ok_or_else(|| "expected a vector, or a name such as UD".to_owned())
}

impl fmt::Display for Vector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match EXCEPTIONS.iter().find(|(_, vector, _)| *vector == self.0) {
            Some((name, ..)) => write!(f, "#{name}"),
            None => write!(f, "exception {}", self.0),
        }
    }
}

/// An exception with what belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its vector.
    pub vector: Vector,
    /// Its error code, if it has one.
    pub error_code: Option<u32>,
    /// The address of a page fault.
    pub address: Option<u64>,
}

impl Exception {
    /// Makes an exception of what is said about it, and leaves out what it does not have.
    pub fn new(vector: Vector, error_code: u32, address: u64) -> Self {
        let has_code = EXCEPTIONS
            .iter()
            .any(|(_, with, code)| *with == vector.0 && *code);
        Self {
            vector,
            error_code: has_code.then_some(error_code),
            address: (vector.0 == PAGE_FAULT).then_some(address),
        }
    }

    /// What a TRAP event says is delivered; nothing for other events, and for an exception that got
    /// lost.
    pub fn of_event(event: &VcpuEventKind) -> Option<Self> {
        match event {
            VcpuEventKind::Trap {
                nr,
                error_code,
                address,
            } if *nr < VECTORS => Some(Self::new(Vector(*nr), *error_code, *address)),
            _ => None,
        }
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.vector)?;
        if let Some(code) = self.error_code {
            write!(f, ", error code {code:#x}")?;
        }
        if let Some(address) = self.address {
            write!(f, ", address {address:#x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_names() {
        for text in ["14", "0xe", "PF", "#PF", "pf"] {
            assert_eq!(parse(text), Ok(Vector(14)), "{text}");
        }
        assert_eq!(parse("31"), Ok(Vector(31)));
        for bad in ["32", "256", "0x10000000000", "", "#", "XX", "-1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        for (name, vector, _) in EXCEPTIONS {
            assert_eq!(parse(name), Ok(Vector(vector)));
        }
    }

    #[test]
    fn exceptions_have_only_what_belongs_to_them() {
        let text = |vector| Exception::new(Vector(vector), 2, 0x1000).to_string();
        assert_eq!(text(14), "#PF, error code 0x2, address 0x1000");
        assert_eq!(text(13), "#GP, error code 0x2");
        assert_eq!(text(6), "#UD");
        assert_eq!(text(9), "exception 9");
    }

    #[test]
    fn lost_exception_is_none() {
        let trap = |nr| VcpuEventKind::Trap {
            nr,
            error_code: 1,
            address: 2,
        };
        let breakpoint = Exception::of_event(&trap(3)).unwrap();
        assert_eq!(breakpoint, Exception::new(Vector(3), 0, 0));
        assert_eq!(Exception::of_event(&trap(0xff)), None);
        assert_eq!(Exception::of_event(&VcpuEventKind::Pause), None);
    }
}
