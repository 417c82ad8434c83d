// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Pages of one VM in another one, often, many, and while all else changes.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use iced_x86::code_asm::*;
use kvmi_abi::hypercall::{MapEntry, MEM_MAP, MEM_MAP_MANY, MEM_UNMAP, MEM_UNMAP_MANY};

use crate::{
    access_memory::disturb,
    access_tool::{add_code, emit, CODE},
    harness::{note, test, Ctx, Test},
    mapping_tool::{number, Introspector, ARRAY, PAGE_OF_TARGET, TOKEN, WINDOW},
    memory::Memory,
    sys,
    util::Rng,
    vcpu::Exit,
    vm::{TestVm, MEMORY, PAGE},
};

const AREA: &str = "mapping_stress";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(both_guests_count_exactly_while_the_memory_moves).long(),
    test!(writes_go_to_one_of_both_pages_while_it_is_mapped_and_unmapped).long(),
    test!(ten_thousand_mappings).long(),
    test!(four_thousand_pages_at_a_time).long(),
    test!(mappings_may_race_with_the_end_of_sessions_and_slots).long(),
    test!(hypercalls_with_random_arguments_harm_nobody).long(),
];

/// What both guests count in.
const CELL: u64 = 64;

/// Code that increments a cell this often.
fn counting(code: &mut CodeAssembler, cell: u64, rounds: u64) {
    let mut again = code.create_label();
    emit(code.mov(rsi, cell));
    emit(code.mov(rcx, rounds));
    emit(code.set_label(&mut again));
    emit(code.lock().inc(qword_ptr(rsi)));
    emit(code.dec(rcx));
    emit(code.jnz(again));
}

fn both_guests_count_exactly_while_the_memory_moves(ctx: &Ctx) {
    let rounds = 200_000 * ctx.rounds(10) as u64;
    let memory = Memory::huge(MEMORY);
    memory.mergeable();
    let mut target = TestVm::with_memory(memory, 0);
    let mut introspector = Introspector::new();
    let address = CODE + 0x1000;
    let mut theirs = add_code(&mut target, address, |code| {
        counting(code, PAGE_OF_TARGET + CELL, rounds);
    });
    let mut ours = add_code(&mut introspector.vm, address, |code| {
        counting(code, WINDOW + CELL, rounds);
    });
    let mut tool = target.hook_allowing_all();
    let mapped = introspector.map_page(&mut tool, PAGE_OF_TARGET, WINDOW);
    assert_eq!(mapped, 0);
    theirs.run_through();
    ours.run_through();
    let over = AtomicBool::new(false);
    let collapsed = thread::scope(|scope| {
        let disturb = scope.spawn(|| disturb(&memory, &over));
        assert_eq!(theirs.exit(), Exit::Out(0x10));
        assert_eq!(ours.exit(), Exit::Out(0x10));
        over.store(true, Ordering::Relaxed);
        disturb.join().expect("it does not fail")
    });
    note!("{collapsed} times there was a huge page");
    assert_eq!(number(&target, PAGE_OF_TARGET + CELL), 2 * rounds);
    assert_eq!(introspector.load(WINDOW + CELL), 2 * rounds);
}

fn writes_go_to_one_of_both_pages_while_it_is_mapped_and_unmapped(ctx: &Ctx) {
    let rounds = 200_000 * ctx.rounds(10) as u64;
    let target = TestVm::new();
    let mut introspector = Introspector::new();
    let mut writer = add_code(&mut introspector.vm, CODE + 0x1000, |code| {
        counting(code, WINDOW + CELL, rounds);
    });
    let mut tool = target.hook_allowing_all();
    writer.run_through();
    let mut done = 0;
    while number(&introspector.vm, WINDOW + CELL) + number(&target, PAGE_OF_TARGET + CELL) < rounds
    {
        let mapped = introspector.map_page(&mut tool, PAGE_OF_TARGET, WINDOW);
        assert_eq!(mapped, 0);
        introspector.load(WINDOW);
        assert_eq!(introspector.unmap(WINDOW), 0);
        done += 1;
    }
    assert_eq!(writer.exit(), Exit::Out(0x10));
    note!("{done} times mapped and unmapped");
    let (own, other) = (
        number(&introspector.vm, WINDOW + CELL),
        number(&target, PAGE_OF_TARGET + CELL),
    );
    assert_eq!(own + other, rounds, "{own} and {other}");
}

fn ten_thousand_mappings(ctx: &Ctx) {
    let target = TestVm::new();
    let mut introspector = Introspector::new();
    let mut tool = target.hook_allowing_all();
    for round in 0..ctx.rounds(10_000) as u64 {
        target.memory.write(PAGE_OF_TARGET, &round.to_le_bytes());
        let mapped = introspector.map_page(&mut tool, PAGE_OF_TARGET, WINDOW);
        assert_eq!(mapped, 0);
        assert_eq!(introspector.load(WINDOW), round);
        assert_eq!(introspector.unmap(WINDOW), 0);
    }
    assert_eq!(introspector.load(WINDOW), 0);
}

fn four_thousand_pages_at_a_time(ctx: &Ctx) {
    const BASE: u64 = 0x100_0000;
    const AT_ONCE: usize = 256;
    let pages = AT_ONCE * ctx.rounds(16);
    let [first, second] = [0, 1].map(|_| Memory::new(pages * PAGE));
    let target = TestVm::new();
    target.add_slot(1, BASE, &first);
    let mut introspector = Introspector::new();
    introspector.vm.add_slot(1, BASE, &second);
    let mut tool = target.hook_allowing_all();
    let gpas: Vec<_> = (0..pages).map(|nth| BASE + (nth * PAGE) as u64).collect();
    let entries: Vec<_> = gpas
        .iter()
        .map(|gpa| MapEntry {
            target_gpa: *gpa,
            gpa: *gpa,
        })
        .collect();
    for gpa in &gpas {
        first.write(gpa - BASE, &gpa.to_le_bytes());
    }
    for entries in entries.chunks(AT_ONCE) {
        let mapped = introspector.present(&mut tool, |guest, token| guest.map_many(token, entries));
        assert_eq!(mapped, 0);
    }
    for gpa in gpas.iter().step_by(7) {
        assert_eq!(introspector.load(*gpa), *gpa);
    }
    target.unhook();
    for gpa in gpas.iter().step_by(7) {
        assert_eq!(introspector.load(*gpa), 0);
    }
}

fn mappings_may_race_with_the_end_of_sessions_and_slots(ctx: &Ctx) {
    const BASE: u64 = 0x100_0000;
    let target = &TestVm::new();
    let slot = Memory::new(PAGE);
    let mut introspector = Introspector::new();
    let rounds = ctx.rounds(300);
    let over = AtomicBool::new(false);
    let mapped = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                target.add_slot(1, BASE, &slot);
                target.remove_slot(1);
            }
        });
        let mut mapped = 0;
        for round in 0..rounds {
            let mut tool = target.hook_allowing_all();
            let tokens = [0, 1, 2].map(|_| tool.map_token());
            let ender = scope.spawn(move || {
                if round % 2 == 0 {
                    target.unhook();
                }
                drop(tool);
            });
            for (nth, token) in tokens.iter().enumerate() {
                let gpa = if nth == 1 { BASE } else { PAGE_OF_TARGET };
                let window = WINDOW + (nth * PAGE) as u64;
                match introspector.map(token, gpa, window) {
                    0 => mapped += 1,
                    // No session, no token; no slot, or not the same any more.
                    error => assert!([-2, -16].contains(&error), "{error}"),
                }
                introspector.load(window);
            }
            ender.join().expect("it does not fail");
            // It may have been done.
            let _ = sys::unhook(target);
            for nth in 0..3 {
                let window = WINDOW + (nth * PAGE) as u64;
                assert_eq!(introspector.unmap(window), -2, "round {round}");
            }
        }
        over.store(true, Ordering::Relaxed);
        mapped
    });
    note!("{mapped} of {} pages were mapped", 3 * rounds);
}

/// A number that is likely to mean something.
fn argument(rng: &mut Rng) -> u64 {
    let base = rng.pick(&[
        0,
        TOKEN,
        ARRAY,
        WINDOW,
        PAGE_OF_TARGET,
        MEMORY as u64,
        1,
        256,
        512,
        u64::MAX,
        1 << 47,
        1 << 63,
    ]);
    base.wrapping_add(rng.pick(&[0, 0, 0, 1, 8, PAGE as u64, 0u64.wrapping_sub(PAGE as u64)]))
}

fn hypercalls_with_random_arguments_harm_nobody(ctx: &Ctx) {
    let target = TestVm::counting(1);
    let mut introspector = Introspector::new();
    let mut tool = target.hook_allowing_all();
    let mut rng = ctx.rng();
    note!("seed {}", ctx.seed());
    let mut done = 0;
    for round in 0..ctx.rounds(20_000) {
        if round % 4 == 0 {
            let token = tool.try_map_token(0);
            if let Ok(token) = token {
                introspector.vm.memory.write(TOKEN, &token.bytes);
            }
            let entries: Vec<_> = (0..512).map(|_| argument(&mut rng)).collect();
            let bytes: Vec<_> = entries.iter().flat_map(|n| n.to_le_bytes()).collect();
            introspector.vm.memory.write(ARRAY, &bytes);
        }
        let nr = rng.pick(&[MEM_MAP, MEM_UNMAP, MEM_MAP_MANY, MEM_UNMAP_MANY, 34]);
        let mut args = [0, 1, 2].map(|_| argument(&mut rng));
        if rng.one_in(2) {
            args[0] = TOKEN;
        }
        let result = introspector.call(nr, args);
        let known = [-1, -2, -7, -14, -16, -22, -114, -1000];
        assert!(
            (0..=512).contains(&result) || known.contains(&result),
            "{nr} {args:x?}: {result}"
        );
        done += u32::from(result >= 0);
        // What holds code, tokens and tables stays the guest's own.
        for page in [0, TOKEN, ARRAY, CODE] {
            introspector.unmap(page & !(PAGE as u64 - 1));
        }
    }
    note!("{done} calls succeeded");
    target.expect_progress();
    tool.settle();
}
