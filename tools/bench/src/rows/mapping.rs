// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Memory of one guest that another one has mapped.

use std::os::unix::net::UnixStream;

use anyhow::{ensure, Result};
use kvm_ioctls::VcpuFd;
use kvmi_client::{
    abi::hypercall::{MapEntry, MAX_MAP, MEM_MAP, MEM_MAP_MANY, MEM_UNMAP, MEM_UNMAP_MANY},
    device::Device,
    Connection,
};
use tiny_vm::{guest::Mode, Guest, Memory, Vm, MEMORY, PAGE, SCRATCH};
use zerocopy::IntoBytes as _;

use super::{exit, Bench, Row};
use crate::{act, figure::Spread, program::Program, scene::Hook, stage::pages};

pub const OWN: &str = "guest reads 4 KiB, its own";
pub const MAPPED: &str = "guest reads 4 KiB, another guest's";
pub const SINGLE: &str = "token, map and unmap 1 page";
pub const BULK: &str = "token, map and unmap 256 pages, for each";

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row::hooked(OWN, |bench| reading(bench, false, 1)),
    Row::hooked(MAPPED, |bench| reading(bench, true, 1)),
    Row::hooked("guest reads 64 MiB, its own", |bench| {
        reading(bench, false, ALL)
    }),
    Row::hooked("guest reads 64 MiB, another guest's", |bench| {
        reading(bench, true, ALL)
    }),
    Row::hooked(SINGLE, |bench| mapping(bench, 1)),
    Row::hooked(BULK, |bench| mapping(bench, MAX_MAP)),
];

/// Guest physical address of what both VMs have for this.
const BASE: u64 = 0x1000_0000;
/// Pages from there on.
const ALL: usize = 16384;
/// Where the guest has the token, its array, and the code of hypercalls.
const TOKEN: u64 = SCRATCH + 0x4000;
const ARRAY: u64 = SCRATCH + 0x5000;
const CALL: u64 = SCRATCH + 0x6000;

/// A VM that is looked into, and one whose guest does that.
struct Couple {
    vm: Vm,
    /// Makes hypercalls.
    caller: VcpuFd,
    hook: Hook,
    _target: Vm,
}

impl Couple {
    /// Adds a vCPU for hypercalls to a VM, and a target to look into.
    fn new(mut vm: Vm) -> Result<Self> {
        let (own, lent) = (Memory::new(ALL * PAGE), Memory::new(ALL * PAGE));
        for memory in [own, lent] {
            memory.fill(0, memory.len, 1);
        }
        vm.add_slot(1, BASE, &own);
        // Then: out %al, $0x10
        let code = [&act::hypercall()?[..], &[0xe6, 0x10]].concat();
        vm.memory.write(CALL, &code);
        let (_, caller) = vm.prepare_started(Guest::Spin(Mode::Long));
        Device::open()?.set_introspector(&vm, true)?;
        let target = Vm::with_memory(Memory::new(MEMORY), 0);
        target.add_slot(1, BASE, &lent);
        Ok(Self {
            vm,
            caller,
            hook: Hook::new(&target)?,
            _target: target,
        })
    }

    /// Has the guest make a hypercall; fails unless its result is this.
    fn call(&mut self, nr: u32, args: [u64; 3], expected: u64) -> Result<()> {
        let mut regs = self.caller.get_regs()?;
        (regs.rip, regs.rax) = (CALL, nr.into());
        [regs.rbx, regs.rcx, regs.rdx] = args;
        self.caller.set_regs(&regs)?;
        exit::run(&mut self.caller)?;
        let result = self.caller.get_regs()?.rax;
        ensure!(result == expected, "hypercall {nr}: {}", result as i64);
        Ok(())
    }

    /// Maps pages of the target in place of the guest's own with the same addresses.
    fn map(&mut self, pages: &[u64]) -> Result<()> {
        let token = Connection::<&UnixStream>::new(&self.hook.tool).map_token(true)?;
        self.vm.memory.write(TOKEN, &token.bytes);
        if let [gpa] = *pages {
            return self.call(MEM_MAP, [TOKEN, gpa, gpa], 0);
        }
        let entry = |gpa: &u64| MapEntry {
            target_gpa: *gpa,
            gpa: *gpa,
        };
        let entries: Vec<_> = pages.iter().map(entry).collect();
        self.vm.memory.write(ARRAY, entries.as_bytes());
        self.call(MEM_MAP_MANY, [TOKEN, ARRAY, pages.len() as u64], 0)
    }

    fn unmap(&mut self, pages: &[u64]) -> Result<()> {
        if let [gpa] = *pages {
            return self.call(MEM_UNMAP, [gpa, 0, 0], 0);
        }
        self.vm.memory.write(ARRAY, pages.as_bytes());
        let count = pages.len() as u64;
        self.call(MEM_UNMAP_MANY, [ARRAY, count, 0], count)
    }
}

/// What it takes a guest to read so many pages, which it has read before.
fn reading(bench: &Bench<'_>, map: bool, count: usize) -> Result<Spread> {
    let read = |pages_read: usize| {
        let program = Program::ReadOut(u32::try_from(pages_read)?, BASE);
        let (vm, mut vcpu) = program.load()?;
        let mut couple = Couple::new(vm)?;
        if map {
            let all: Vec<_> = pages(BASE, pages_read).collect();
            all.chunks(MAX_MAP).try_for_each(|some| couple.map(some))?;
        }
        exit::run(&mut vcpu)?;
        let bench = bench.fewer_rounds(pages_read.clamp(10, 100));
        bench.measure(|| exit::run(&mut vcpu))
    };
    // Without the way there and back.
    Ok(read(count)?.share(read(0)?, 1))
}

/// What it takes to map and unmap one of so many pages.
fn mapping(bench: &Bench<'_>, count: usize) -> Result<Spread> {
    let (vm, _vcpu) = Program::ReadOut(0, BASE).load()?;
    let mut couple = Couple::new(vm)?;
    let pages: Vec<_> = pages(BASE, count).collect();
    let bench = bench.fewer_rounds(10);
    let all = bench.measure(|| {
        couple.map(&pages)?;
        couple.unmap(&pages)
    })?;
    let nothing = Spread {
        min: 0.0,
        median: 0.0,
        p90: 0.0,
        rounds: 0,
    };
    Ok(all.share(nothing, u32::try_from(count)?))
}
