// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The other end of the port of `--host`: somebody on the host who introspects another VM, and
//! who serves lines of text:
//!
//! | request | reply |
//! |---|---|
//! | `pages` | `GPA COUNT`: consecutive pages of that VM that the tests may use, at least 512 |
//! | `token` | a new token for that VM: 64 hexadecimal digits, the bytes in their order |
//! | `read GPA` | the 8 bytes there, as a little-endian number |
//! | `write GPA VALUE` | `ok`, when that is done |
//!
//! Numbers are hexadecimal. A reply that begins with `error` fails the test.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
};

use kvmi_abi::token::MapToken;
use zerocopy::FromBytes as _;

use crate::harness::Options;

/// The connection to the host.
pub struct Host {
    port: BufReader<File>,
}

impl Host {
    /// Opens the port.
    #[track_caller]
    pub fn new(options: &Options) -> Self {
        let path = options.host.as_ref().expect("the test needs a host");
        let port = OpenOptions::new().read(true).write(true).open(path);
        Self {
            port: BufReader::new(port.expect("the port can be opened")),
        }
    }

    #[track_caller]
    fn ask(&mut self, request: &str) -> String {
        writeln!(self.port.get_mut(), "{request}").expect("the port takes a request");
        let mut reply = String::new();
        self.port.read_line(&mut reply).expect("there is a reply");
        let reply = reply.trim().to_owned();
        assert!(
            !reply.starts_with("error") && !reply.is_empty(),
            "{request}: {reply}"
        );
        reply
    }

    /// Pages of the other VM: guest physical address of the first one, and how many there are.
    #[track_caller]
    pub fn pages(&mut self) -> (u64, usize) {
        let reply = self.ask("pages");
        let (gpa, count) = reply.split_once(' ').expect("two numbers");
        (number(gpa), number(count) as usize)
    }

    /// A new token.
    #[track_caller]
    pub fn token(&mut self) -> MapToken {
        let digits = self.ask("token");
        let bytes: Vec<u8> = (0..32)
            .map(|byte| u8::from_str_radix(&digits[2 * byte..][..2], 16).expect("two digits"))
            .collect();
        MapToken::read_from_bytes(&bytes).expect("32 bytes are a token")
    }

    /// What is at an address of the other VM.
    #[track_caller]
    pub fn read(&mut self, gpa: u64) -> u64 {
        number(&self.ask(&format!("read {gpa:x}")))
    }

    /// Changes what is at an address of the other VM.
    #[track_caller]
    pub fn write(&mut self, gpa: u64, value: u64) {
        assert_eq!(self.ask(&format!("write {gpa:x} {value:x}")), "ok");
    }
}

#[track_caller]
fn number(digits: &str) -> u64 {
    u64::from_str_radix(digits, 16).expect("a hexadecimal number")
}
