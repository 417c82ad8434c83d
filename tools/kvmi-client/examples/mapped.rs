// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A tool in a VM of its own that shares memory with the Linux guest that it looks into: sees the
//! guest count its ticks, changes a text of the guest's, and stays until introspection ends.
//!
//! `mapped PORT SYSTEM.MAP MIB OLD NEW` waits at that port of vsock for `kvmictl attach` on the host.
//! NEW, of the same length, takes the place of OLD wherever that is at the beginning of a page, as
//! the contents of a file are, in the first MIB mebibytes.

use std::{env, error::Error, ops::ControlFlow, os::fd::AsFd, thread::sleep, time::Duration};

use kvmi_client::{
    mapped::{Mapping, Window},
    symbols::Symbols,
    tool, Connection, PAGE_SIZE,
};
use vsock::{VsockListener, VMADDR_CID_ANY};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const SECOND: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [port, map, mib, old, new] = arguments.as_slice() else {
        return Err("usage: mapped PORT SYSTEM.MAP MIB OLD NEW".into());
    };
    let end = mib.parse::<u64>()?.saturating_mul(1 << 20);
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port.parse()?)?;
    let (stream, _) = listener.accept()?;
    tool::accept(&stream, None, 10 * SECOND)?;
    let mut vm = Connection::new(stream);
    let window = Window::open(256)?;

    let ticks = find_ticks(&mut vm, map)?;
    let memory = window.map(&mut vm, ticks, 8)?;
    let before: u64 = memory.read_obj(ticks)?;
    sleep(SECOND);
    let after: u64 = memory.read_obj(ticks)?;
    println!("jiffies_64 at {ticks:#x} was {before}, and is {after} without any call");

    for gpa in find_pages(&mut vm, &window, end, old.as_bytes())? {
        let page = window.map_writable(&mut vm, gpa, old.len())?;
        page.write(gpa, new.as_bytes())?;
        println!("{old:?} at {gpa:#x} is {new:?} from now on");
    }
    stay(&mut vm, &memory, ticks)
}

/// Where the guest's kernel counts its ticks.
fn find_ticks(vm: &mut Connection<impl AsFd>, map: &str) -> Result<u64> {
    let kernel = Symbols::load(map)?.locate(vm, &[0])?;
    let gva = kernel.address("jiffies_64")?;
    Ok(vm.translate_gva(0, gva)?.ok_or("it is not mapped now")?)
}

/// The pages that begin with `text`.
fn find_pages(
    vm: &mut Connection<impl AsFd>,
    window: &Window,
    end: u64,
    text: &[u8],
) -> Result<Vec<u64>> {
    let mut found = Vec::new();
    let _: ControlFlow<()> = window.scan(vm, 0, end, |page, bytes| {
        if bytes.is_ok_and(|bytes| bytes.starts_with(text)) {
            found.push(page.gpa - page.gpa % PAGE_SIZE);
        }
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

/// Keeps the pages, until there is no connection any more.
fn stay(vm: &mut Connection<impl AsFd>, memory: &Mapping<'_>, ticks: u64) -> Result<()> {
    loop {
        match vm.next_event(Some(SECOND)) {
            Ok(_) => {}
            Err(kvmi_client::Error::Timeout) => {
                println!("jiffies_64 is {}", memory.read_obj::<u64>(ticks)?);
            }
            Err(kvmi_client::Error::Closed) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let now: u64 = memory.read_obj(ticks)?;
    println!("introspection has ended, and there is {now} in place of jiffies_64");
    Ok(())
}
