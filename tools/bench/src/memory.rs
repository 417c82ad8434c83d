// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Memory of another process, which `process_vm_readv(2)` reads.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::uio::{process_vm_readv, RemoteIoVec},
    unistd::Pid,
};
use tiny_vm::PAGE;

/// Another process with a page of memory; it ends with this value.
pub struct Holder {
    child: Child,
    address: usize,
}

impl Holder {
    /// Starts the process.
    pub fn start() -> Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg("hold-memory")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().context("no output of the process")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let address = line.trim().parse().context("no address of the memory")?;
        Ok(Self { child, address })
    }

    /// Reads the first bytes of the page.
    pub fn read(&self, buffer: &mut [u8]) -> Result<()> {
        let remote = RemoteIoVec {
            base: self.address,
            len: buffer.len(),
        };
        let pid = Pid::from_raw(self.child.id().try_into()?);
        process_vm_readv(pid, &mut [io::IoSliceMut::new(buffer)], &[remote])?;
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // The end of its input ends it.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// The process: tells where the page is, and stays until its input ends.
pub fn hold() -> Result<()> {
    let page = [1_u8; 2 * PAGE];
    let address = page.as_ptr().addr().next_multiple_of(PAGE);
    let mut output = io::stdout();
    writeln!(output, "{address}")?;
    output.flush()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    // It is used until here.
    std::hint::black_box(page);
    Ok(())
}
