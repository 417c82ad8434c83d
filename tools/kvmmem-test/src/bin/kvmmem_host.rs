// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmmem_host SOCKET`: speaks for the host to `kvmmem_test --host`, as `src/host.rs` says.
//!
//! Introspects a VM of its own, the target, and serves the one who connects to the socket: the
//! VMM of the guest in which the tests run.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    process::ExitCode,
};

use kvmi_client::{attach::Attachment, Connection};
use tiny_vm::{Memory, Vm, MEMORY, PAGE};

/// Where the target has memory that nobody but the tests uses.
const PAGES: u64 = 0x100_0000;
const COUNT: usize = 1024;

/// The target, and the tool's connection to it.
struct Host {
    vm: Connection<UnixStream>,
    // In this order.
    _attachment: Attachment,
    _target: Vm,
}

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

impl Host {
    fn new() -> Result<Self> {
        let target = Vm::with_memory(Memory::new(MEMORY), 0);
        target.add_slot(1, PAGES, &Memory::new(COUNT * PAGE));
        let (attachment, vm) = Attachment::connect(std::process::id().try_into()?)?;
        Ok(Self {
            vm,
            _attachment: attachment,
            _target: target,
        })
    }

    fn answer(&mut self, request: &str) -> Result<String> {
        let words: Vec<_> = request.split_whitespace().collect();
        match words[..] {
            ["pages"] => Ok(format!("{PAGES:x} {COUNT:x}")),
            ["token"] => {
                let token = self.vm.map_token(true)?;
                Ok(token.bytes.map(|byte| format!("{byte:02x}")).concat())
            }
            ["read", gpa] => {
                let mut bytes = [0; 8];
                self.vm.read_physical(number(gpa)?, &mut bytes)?;
                Ok(format!("{:x}", u64::from_le_bytes(bytes)))
            }
            ["write", gpa, value] => {
                let bytes = number(value)?.to_le_bytes();
                self.vm.write_physical(number(gpa)?, &bytes)?;
                Ok("ok".to_owned())
            }
            _ => Err(format!("no such request: {request:?}").into()),
        }
    }

    fn serve(&mut self, guest: UnixStream) -> Result<()> {
        let mut replies = guest.try_clone()?;
        for request in BufReader::new(guest).lines() {
            let reply = self.answer(&request?);
            let reply = reply.unwrap_or_else(|error| format!("error: {error}"));
            writeln!(replies, "{reply}")?;
        }
        Ok(())
    }
}

fn number(digits: &str) -> Result<u64> {
    Ok(u64::from_str_radix(digits, 16)?)
}

fn run() -> Result<()> {
    let path = std::env::args().nth(1).ok_or("usage: kvmmem_host SOCKET")?;
    let mut host = Host::new()?;
    // It is there when all is ready.
    let listener = UnixListener::bind(path)?;
    let (guest, _) = listener.accept()?;
    host.serve(guest)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvmmem_host: {error}");
            ExitCode::FAILURE
        }
    }
}
