// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Processes that map pages of a VM, and may be killed: a tool, and the VMM of an introspector.

use std::{os::fd::RawFd, thread, time::Duration};

use kvmi_abi::{
    hypercall::MapEntry,
    token::{GetMapToken, MapToken},
    Command, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    mapping_tool::{Introspector, PAGE_OF_TARGET, WINDOW},
    role::{attach, serve, Orders, Servant},
    tool::{structure, Tool},
    vm::PAGE,
};

/// The role of a tool that asks for tokens.
pub const MAPPER: &str = "mapper";
/// The role of the VMM of an introspector.
pub const INTROSPECTOR: &str = "introspector";

/// What a tool says whose session has ended.
pub const CLOSED: &str = "closed";

/// How many pages are mapped, from [`PAGE_OF_TARGET`] and [`WINDOW`] on.
pub const PAGES: u64 = 3;

/// The number of the introspector's page number `nth`.
pub fn window(nth: u64) -> u64 {
    WINDOW + nth * PAGE as u64
}

/// What such a page of the introspector's own begins with.
pub fn own(nth: u64) -> u64 {
    !window(nth)
}

impl Servant {
    /// Starts a tool, which attaches a VM of this process.
    #[track_caller]
    pub fn mapper(vm_fd: RawFd) -> Self {
        let pid = std::process::id().to_string();
        Self::start(&[MAPPER, &pid, &vm_fd.to_string()])
    }

    /// Starts the VMM of an introspector.
    #[track_caller]
    pub fn introspector() -> Self {
        Self::start(&[INTROSPECTOR])
    }
}

/// Of a tool.
impl Orders {
    /// A token, or [`CLOSED`]; `None` if the tool is dead.
    pub fn token(&mut self) -> Option<String> {
        self.give("token")
    }
}

/// Of an introspector; they return `None` if it is dead.
impl Orders {
    #[track_caller]
    fn number<T: std::str::FromStr>(&mut self, order: &str) -> Option<T> {
        let answer = self.give(order)?;
        let number = answer.parse().ok();
        assert!(number.is_some(), "{order}: {answer}");
        number
    }

    /// Maps all pages with this token.
    #[track_caller]
    pub fn map(&mut self, token: &str) -> Option<i64> {
        self.number(&format!("map {token}"))
    }

    /// Unmaps all pages.
    #[track_caller]
    pub fn unmap(&mut self) -> Option<i64> {
        self.number("unmap")
    }

    /// Reads there.
    #[track_caller]
    pub fn load(&mut self, gpa: u64) -> Option<u64> {
        self.number(&format!("load {gpa}"))
    }

    /// Writes there, and reads that.
    #[track_caller]
    pub fn store(&mut self, gpa: u64, value: u64) -> Option<u64> {
        self.number(&format!("store {gpa} {value}"))
    }
}

/// Is a tool that asks for tokens.
pub fn be_mapper(pid: i32, vm_fd: RawFd) {
    let (_dev, mut tool) = attach(pid, vm_fd);
    serve(|_| loop {
        match ask_for_token(&mut tool) {
            Some(Ok(token)) => break print_token(&token),
            // Those that died with an introspector have to expire.
            Some(Err(KvmiError::Again)) => thread::sleep(Duration::from_millis(10)),
            Some(Err(error)) => panic!("VM_GET_MAP_TOKEN: {error}"),
            None => break CLOSED.into(),
        }
    })
}

/// VM_GET_MAP_TOKEN; `None` if the session has ended.
fn ask_for_token(tool: &mut Tool) -> Option<Result<MapToken, KvmiError>> {
    let request = GetMapToken::default();
    let sent = tool.try_send(Command::VmGetMapToken.id(), request.as_bytes());
    sent.ok()?;
    let reply = tool.receive()?.reply();
    Some(reply.map(|reply| structure(Ok(reply))))
}

fn print_token(token: &MapToken) -> String {
    token.bytes.map(|byte| byte.to_string()).join(" ")
}

fn parse_token(words: &[&str]) -> MapToken {
    let bytes: Vec<u8> = words
        .iter()
        .map(|word| word.parse().expect("a byte"))
        .collect();
    MapToken {
        bytes: bytes.try_into().expect("as many bytes as a token has"),
    }
}

/// Is the VMM of an introspector.
pub fn be_introspector() {
    let mut guest = Introspector::new();
    let gpas: Vec<_> = (0..PAGES).map(window).collect();
    let entries: Vec<_> = (0..PAGES)
        .map(|nth| MapEntry {
            target_gpa: PAGE_OF_TARGET + nth * PAGE as u64,
            gpa: window(nth),
        })
        .collect();
    for nth in 0..PAGES {
        let number = own(nth).to_le_bytes();
        guest.vm.memory.write(window(nth), &number);
    }
    serve(|words| {
        let number = |nth: usize| words[nth].parse().expect("a number");
        match words[0] {
            "map" => {
                let token = parse_token(&words[1..]);
                guest.map_many(&token, &entries).to_string()
            }
            "unmap" => guest.unmap_many(&gpas).to_string(),
            "load" => guest.load(number(1)).to_string(),
            "store" => {
                guest.store(number(1), number(2));
                guest.load(number(1)).to_string()
            }
            word => panic!("no order {word}"),
        }
    });
}
