// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A tool in its simplest form: waits for a VMM on a UNIX socket, says which VM it offers and what
//! the start of its memory looks like, and stays until it is told that the VM is unhooked.
//!
//! `kvmictl attach --socket PATH` makes a running VM's VMM connect.

use std::{env, error::Error, fs, os::unix::net::UnixListener, time::Duration};

use kvmi_client::{tool, Connection, Event, EventId};

fn main() -> Result<(), Box<dyn Error>> {
    let path = env::args().nth(1).ok_or("usage: listen PATH")?;
    let listener = UnixListener::bind(&path)?;
    let (stream, _) = listener.accept()?;
    fs::remove_file(&path)?;

    let hello = tool::accept(&stream, None, Duration::from_secs(10))?;
    let name = String::from_utf8_lossy(hello.name()).into_owned();
    println!("offered: {name:?}, memory up to {:#x}", hello.max_gpa);

    let mut vm = Connection::new(stream);
    let version = vm.get_version()?.version;
    let vcpus = vm.get_info()?.vcpu_count;
    println!("protocol version {version}, {vcpus} vCPUs");

    let mut start = [0; 16];
    vm.read_physical(0, &mut start)?;
    println!("memory starts with {start:02x?}");

    vm.control_events(EventId::Unhook, true)?;
    match vm.next_event(None)? {
        Event::Unhook { seq } => println!("event {seq}: to be unhooked; good bye"),
        other => println!("unexpected: {other:?}"),
    }
    Ok(())
}
