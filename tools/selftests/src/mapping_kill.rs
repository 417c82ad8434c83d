// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The target's VMM, the introspector's VMM and the tool are killed, alone and together, while
//! pages are mapped, read, written and unmapped.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use crate::{
    guest,
    harness::{note, test, Ctx, Test},
    hook::expect_module_in_use,
    mapping_servants::{own, window, CLOSED, PAGES},
    mapping_tool::{ENOENT, PAGE_OF_TARGET},
    role::{Helper, Orders, Servant, Vmm, VMM_MEMORY, VMM_PATTERN},
    util::{wait_for, Rng},
};

const AREA: &str = "mapping_kill";

/// The tests of this file.
pub const TESTS: &[Test] = &[test!(each_party_may_be_killed_at_any_moment)
    .long()
    .destructive()];

/// The target's memory has changed meanwhile.
const EBUSY: i64 = -16;

/// Where pages are written to; what they begin with stays.
const CELL: u64 = 8;

/// What a page of the target begins with.
const LENT: u64 = u64::from_le_bytes([VMM_PATTERN; 8]);

/// Who is killed in a round.
#[derive(Clone, Copy, Debug)]
struct Victims {
    target: bool,
    introspector: bool,
    tool: bool,
}

impl Victims {
    /// One of them, two, or all.
    fn any(rng: &mut Rng) -> Self {
        let set = 1 + rng.below(7);
        Self {
            target: set & 1 != 0,
            introspector: set & 2 != 0,
            tool: set & 4 != 0,
        }
    }
}

/// The three processes.
struct Parties {
    target: Vmm,
    introspector: Servant,
    tool: Servant,
}

fn each_party_may_be_killed_at_any_moment(ctx: &Ctx) {
    note!("seed {}", ctx.seed());
    let mut rng = ctx.rng();
    let before = references();
    let mut parties = Parties::start();
    let mut done = Done::default();
    for round in 0..ctx.rounds(500) {
        let victims = Victims::any(&mut rng);
        // Without a descriptor of the VM here, it goes with its process.
        if victims.target && rng.one_in(2) {
            parties.target.vm = None;
        }
        parties.kill(victims, &mut rng, &mut done);
        if !(victims.introspector && victims.tool) {
            expect_module_in_use();
        }
        parties.expect_survivors(victims, round);
        parties.replace(victims);
    }
    note!("{done:?}");
    assert_ne!(references(), before);
    drop(parties);
    wait_for("nothing is left", || references() == before);
}

impl Parties {
    fn start() -> Self {
        let target = Vmm::start(1, 0);
        let tool = Servant::mapper(target.vm_fd());
        Self {
            target,
            introspector: Servant::introspector(),
            tool,
        }
    }

    /// Kills the victims, each at a moment of its own, while pages are mapped.
    fn kill(&mut self, victims: Victims, rng: &mut Rng, done: &mut Done) {
        let begun = &AtomicBool::new(false);
        let doomed: Vec<(&mut Helper, Duration)> = [
            (victims.target, &mut self.target.process),
            (victims.introspector, &mut self.introspector.process),
            (victims.tool, &mut self.tool.process),
        ]
        .into_iter()
        .filter(|(is_victim, _)| *is_victim)
        .map(|(_, process)| (process, Duration::from_micros(rng.below(150_000) as u64)))
        .collect();
        let (tool, introspector) = (&mut self.tool.orders, &mut self.introspector.orders);
        thread::scope(|scope| {
            let killers: Vec<_> = doomed
                .into_iter()
                .map(|(process, pause)| {
                    scope.spawn(move || {
                        thread::sleep(pause);
                        begun.store(true, Ordering::SeqCst);
                        process.kill();
                    })
                })
                .collect();
            let over = || killers.iter().all(|killer| killer.is_finished());
            let calm = || !begun.load(Ordering::SeqCst);
            let lived = work(tool, introspector, rng, over, calm, done).is_some();
            assert!(lived || !calm(), "a process has ended by itself");
        });
    }

    /// Fails the test unless those that live go on without the others.
    fn expect_survivors(&mut self, victims: Victims, round: usize) {
        if !victims.introspector {
            let guest = &mut self.introspector.orders;
            for nth in 0..PAGES {
                let seen = guest.load(window(nth));
                assert_eq!(seen, Some(own(nth)), "round {round}, {victims:?}");
                assert_eq!(guest.store(window(nth) + CELL, nth), Some(nth));
            }
            let unmapped = guest.unmap().expect("the introspector lives");
            // A VM that is kept, of a process that is dead, still lends what it has lost.
            let kept = self.target.vm.is_some() && !victims.tool;
            let known = unmapped == ENOENT || kept && unmapped == PAGES as i64;
            assert!(known, "round {round}, {victims:?}: {unmapped}");
        }
        if !victims.target {
            let target = Process::of(&self.target);
            let count = || target.number(guest::counter(0)) as u32;
            let before = count();
            wait_for("the target goes on", || count() != before);
            for nth in 0..PAGES {
                assert_eq!(target.number(page_of_target(nth)), LENT, "round {round}");
            }
        }
        if victims.target && !victims.tool {
            let tool = &mut self.tool.orders;
            if self.target.vm.is_some() && !victims.introspector {
                // There is a VM, but no memory of it.
                let token = tool.token().expect("the tool lives");
                assert_eq!(self.introspector.orders.map(&token), Some(ENOENT));
            }
            self.target.vm = None;
            assert_eq!(tool.token().as_deref(), Some(CLOSED), "round {round}");
        }
    }

    /// Starts others in place of the dead, and a tool for a new target.
    fn replace(&mut self, victims: Victims) {
        if victims.target {
            self.target = Vmm::start(1, 0);
        }
        if victims.target || victims.tool {
            self.tool = Servant::mapper(self.target.vm_fd());
        }
        if victims.introspector {
            self.introspector = Servant::introspector();
        }
    }
}

/// How often what was done.
#[derive(Debug, Default)]
struct Done {
    mapped: u32,
    refused: u32,
    unmapped: u32,
    own: u32,
    lent: u32,
}

/// Maps, reads, writes and unmaps until it is over; `None` as soon as one of both is dead.
fn work(
    tool: &mut Orders,
    introspector: &mut Orders,
    rng: &mut Rng,
    over: impl Fn() -> bool,
    calm: impl Fn() -> bool,
    done: &mut Done,
) -> Option<()> {
    let mut mapped = false;
    while !over() {
        let nth = rng.below(PAGES as usize) as u64;
        match rng.below(8) {
            _ if !mapped => {
                let token = tool.token()?;
                let result = match token.as_str() {
                    CLOSED => ENOENT,
                    token => introspector.map(token)?,
                };
                mapped = result == 0;
                let known = mapped || !calm() && [ENOENT, EBUSY].contains(&result);
                assert!(known, "mapping: {result}");
                done.mapped += u32::from(mapped);
                done.refused += u32::from(!mapped);
            }
            0 => {
                let result = introspector.unmap()?;
                let known = result == PAGES as i64 || !calm() && result == ENOENT;
                assert!(known, "unmapping: {result}");
                mapped = false;
                done.unmapped += 1;
            }
            1..=3 => {
                let value = rng.next();
                let seen = introspector.store(window(nth) + CELL, value)?;
                // It may have gone to one page, and have been read from the other.
                assert!(seen == value || !calm(), "{seen:#x} instead of {value:#x}");
            }
            _ => {
                let seen = introspector.load(window(nth))?;
                let known = seen == LENT || !calm() && seen == own(nth);
                assert!(known, "page {nth} begins with {seen:#x}");
                done.lent += u32::from(seen == LENT);
                done.own += u32::from(seen != LENT);
            }
        }
    }
    Some(())
}

fn page_of_target(nth: u64) -> u64 {
    PAGE_OF_TARGET + nth * crate::vm::PAGE as u64
}

/// The memory of a VM's process.
struct Process(File);

impl Process {
    #[track_caller]
    fn of(vmm: &Vmm) -> Self {
        let memory = File::open(format!("/proc/{}/mem", vmm.process.pid()));
        Self(memory.expect("the process is there"))
    }

    /// A number that the VM has there.
    #[track_caller]
    fn number(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        let read = self.0.read_exact_at(&mut bytes, VMM_MEMORY as u64 + gpa);
        read.expect("its memory is there");
        u64::from_le_bytes(bytes)
    }
}

/// Who refers to the modules, and which VMs there are, as far as the kernel tells.
fn references() -> Vec<String> {
    let modules = ["kvmi_host", "kvm", "kvm_amd", "kvm_intel"];
    let mut found: Vec<_> = modules
        .iter()
        .filter_map(|module| {
            let count = fs::read_to_string(format!("/sys/module/{module}/refcnt")).ok()?;
            Some(format!("{module} {}", count.trim()))
        })
        .collect();
    // Each VM has a directory there.
    let vms = fs::read_dir("/sys/kernel/debug/kvm");
    let vms = vms.into_iter().flatten().flatten();
    found.extend(
        vms.filter(|entry| entry.path().is_dir())
            .map(|entry| entry.file_name().to_string_lossy().into_owned()),
    );
    found
}
