// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Values of arguments.

use std::time::Duration;

use crate::cli::Bytes;

/// Parses a number: decimal or, after `0x`, hexadecimal; K, M, G and T stand for powers of 1024.
pub fn parse(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    // A sign would be taken by the standard library.
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return Err("expected a number such as 4096, 0x1000 or 4K".to_owned());
    }
    let number = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(hex) if hex.starts_with('+') => return Err("expected a hexadecimal number".to_owned()),
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    let number = number.map_err(|error| error.to_string())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "number too large".to_owned())
}

/// Parses a number that fits 32 bits, as [`parse`] does.
pub fn parse_u32(text: &str) -> Result<u32, String> {
    u32::try_from(parse(text)?).map_err(|_| "number too large".to_owned())
}

/// Parses a number that fits 16 bits, as [`parse`] does.
pub fn parse_u16(text: &str) -> Result<u16, String> {
    u16::try_from(parse(text)?).map_err(|_| "number too large".to_owned())
}

/// Parses bytes in hexadecimal; blanks and colons between them do not matter.
pub fn parse_hex(text: &str) -> Result<Bytes, String> {
    let digits: String = text
        .chars()
        .filter(|c| !c.is_whitespace() && *c != ':')
        .collect();
    let digits = digits.strip_prefix("0x").unwrap_or(&digits);
    let bytes = hex::decode(digits).map_err(|error| error.to_string())?;
    not_empty(bytes)
}

/// Parses text: takes it as it is.
pub fn parse_text(text: &str) -> Result<Bytes, String> {
    not_empty(text.as_bytes().to_vec())
}

fn not_empty(bytes: Vec<u8>) -> Result<Bytes, String> {
    if bytes.is_empty() {
        return Err("expected at least one byte".to_owned());
    }
    Ok(Bytes(bytes))
}

/// Parses a time in seconds, which may have a fraction.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// Parses a vsock address.
pub fn parse_vsock(text: &str) -> Result<(u32, u32), String> {
    let address = text.split_once(':').and_then(|(cid, port)| {
        let cid = parse(cid).ok()?.try_into().ok()?;
        let port = parse(port).ok()?.try_into().ok()?;
        Some((cid, port))
    });
    address.ok_or_else(|| "expected CID:PORT, such as 3:4711".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_bases_and_suffixes() {
        for (text, number) in [
            ("0", 0),
            ("4096", 4096),
            ("0x1000", 4096),
            ("0XfF", 255),
            ("4K", 4096),
            ("0x10k", 16384),
            ("3G", 3 << 30),
            ("1t", 1 << 40),
            ("0xffffffffffffffff", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for bad in [
            "",
            "K",
            "-1",
            "+1",
            "0x",
            "0x+1",
            "1Q",
            "1.5",
            "99999999999999999999",
            "16777216T",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_u32("0xffffffff"), Ok(u32::MAX));
        assert!(parse_u32("4G").is_err());
        assert_eq!(parse_u16("0xffff"), Ok(u16::MAX));
        assert!(parse_u16("64K").is_err());
    }

    #[test]
    fn bytes_may_be_grouped() {
        let elf = Bytes(vec![0x7f, 0x45, 0x4c, 0x46]);
        for text in ["7f454c46", "7F 45 4c 46", "7f:45:4c:46", "0x7f454c46"] {
            assert_eq!(parse_hex(text), Ok(elf.clone()), "{text}");
        }
        for bad in ["", " ", "7", "xy", "0x"] {
            assert!(parse_hex(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn vsock_address_has_two_numbers() {
        assert_eq!(parse_vsock("3:0x10"), Ok((3, 16)));
        for bad in ["3", "3:", ":3", "3:x", "4294967296:1", "1:2:3"] {
            assert!(parse_vsock(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn seconds_may_have_a_fraction() {
        assert_eq!(parse_seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "x", "-1", "nan", "inf"] {
            assert!(parse_seconds(bad).is_err(), "{bad}");
        }
    }
}
