// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A VM whose vCPU the measuring thread runs itself, with memory to touch and memory to restrict.

use std::thread;

use anyhow::{anyhow, Context as _, Result};
use kvm_ioctls::VcpuFd;
use tiny_vm::{Memory, Vm, PAGE};

use crate::{
    figure::Setting,
    program::Program,
    rows::exit,
    scene::{Client, Hook},
};

/// Guest physical address of memory that the host has populated.
pub const PLENTY: u64 = 0x2000_0000;
/// Pages from there on: those of one entry of a page directory.
pub const PLENTY_PAGES: usize = 512;
/// Guest physical address of memory that nobody touches.
pub const SPARSE: u64 = 0x4_0000_0000;
/// Its size, as much as fits below 1 TiB: CPUs with fewer bits of physical addresses are rare.
pub const SPARSE_LEN: usize = 1004 << 30;

/// A VM that nobody else runs.
pub struct Stage {
    /// Its connection, if it is hooked.
    pub hook: Option<Hook>,
    /// What is at [`PLENTY`].
    pub plenty: Memory,
    /// Its only vCPU.
    pub vcpu: VcpuFd,
    _vm: Vm,
}

impl Stage {
    /// A VM whose vCPU is to do this, and has done it once. If it is hooked the guest may not write
    /// to the pages `restricted`.
    pub fn new(
        program: Program,
        setting: Setting,
        restricted: impl IntoIterator<Item = u64>,
    ) -> Result<Self> {
        let (vm, mut vcpu) = program.load()?;
        let plenty = Memory::new(PLENTY_PAGES * PAGE);
        plenty.fill(0, plenty.len, 1);
        vm.add_slot(1, PLENTY, &plenty);
        vm.add_slot(2, SPARSE, &Memory::sparse(SPARSE_LEN));
        let hook = match setting {
            Setting::Hooked => {
                let hook = Hook::new(&vm)?;
                hook.protect(restricted)?;
                Some(hook)
            }
            _ => None,
        };
        exit::run(&mut vcpu)?;
        Ok(Self {
            hook,
            plenty,
            vcpu,
            _vm: vm,
        })
    }

    /// Has the tool give commands to the vCPU, which runs meanwhile and may not make events.
    pub fn command(
        &mut self,
        give: impl FnOnce(&mut Client<'_>) -> Result<()> + Send,
    ) -> Result<()> {
        let hook = self.hook.as_ref().context("the VM is not hooked")?;
        thread::scope(|scope| {
            let tool = scope.spawn(|| give(&mut hook.client()));
            run_until(&mut self.vcpu, || tool.is_finished())?;
            tool.join().map_err(|_| anyhow!("the tool has panicked"))?
        })
    }
}

/// Runs a vCPU on the tool's CPU until that has got somewhere.
pub fn run_until(vcpu: &mut VcpuFd, done: impl Fn() -> bool) -> Result<()> {
    while !done() {
        exit::run(vcpu)?;
        thread::yield_now();
    }
    Ok(())
}

/// Addresses of pages that follow each other.
pub fn pages(from: u64, count: usize) -> impl Iterator<Item = u64> + Clone {
    (from..).step_by(PAGE).take(count)
}
