// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Page access and huge pages: they are split where a page is restricted, and nowhere else, and come
//! back.

use std::fs;

use iced_x86::code_asm::*;
use kvmi_abi::access::{ALL, W};

use crate::{
    access_tool::{add_code, emit, CODE},
    guest::GIGABYTE,
    harness::{note, skip, test, Ctx, Test},
    memory::Memory,
    tool::Tool,
    vcpu::{Exit, Vcpu},
    vm::{TestVm, PAGE},
};

const AREA: &str = "access_size";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(page_of_2_mib_is_split_and_comes_back),
    test!(page_of_1_gib_is_split_and_comes_back),
    test!(page_restricted_before_it_is_touched_is_small),
    test!(access_across_pages_of_different_size_is_reported),
];

const MIB2: u64 = 2 << 20;
/// Where memory of huge pages is for the guest.
const HUGE: u64 = 0x400_0000;

/// How a VM's memory is mapped, by KVM's statistics.
struct Sizes(String);

impl Sizes {
    fn of(vm: &TestVm) -> Self {
        let process = std::process::id();
        Self(format!("/sys/kernel/debug/kvm/{process}-{}", vm.raw_fd()))
    }

    /// The number of huge pages of this size: "2m", "1g".
    fn count(&self, size: &str) -> u64 {
        let file = format!("{}/pages_{size}", self.0);
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        text.trim().parse().expect("a number")
    }
}

/// Memory at [`HUGE`] that consists of pages of 2 MiB, two of them.
#[track_caller]
fn two_huge_pages(vm: &TestVm) -> Memory {
    let memory = Memory::huge(2 * MIB2 as usize);
    memory.fill(0, memory.len, 0);
    vm.add_slot(1, HUGE, &memory);
    memory
}

/// A vCPU that touches two pages, and after each exit to the VMM the pages of the next list.
fn touching(vm: &mut TestVm, lists: &[&[u64]]) -> Vcpu {
    add_code(vm, CODE, |code| {
        for list in lists {
            for gpa in *list {
                emit(code.mov(rsi, *gpa));
                emit(code.mov(byte_ptr(rsi), 1));
            }
            emit(code.out(0x11, al));
        }
    })
}

/// Restricts a page of the first of two large pages, and lifts that again.
#[track_caller]
fn split_and_recover(vm: &mut TestVm, first: u64, second: u64, size: &str) {
    let page = first + 5 * PAGE as u64;
    for unhook in [false, true] {
        note!("lifted by unhooking: {unhook}");
        let neighbours = [page - 8, page + PAGE as u64, second];
        let mut vcpu = touching(
            vm,
            &[
                &[first, second],
                &[neighbours[0], page + 8, neighbours[1], neighbours[2]],
                &[page, first, second],
            ],
        );
        let sizes = Sizes::of(vm);
        let before = sizes.count(size);
        assert_eq!(vcpu.run_until_exit(), Exit::Out(0x11));
        if sizes.count(size) == before && !unhook {
            skip("KVM does not map memory by pages of this size here");
        }
        let all = sizes.count(size);
        let mut tool = vm.hook_allowing_all();
        tool.deny(page, W);
        assert_eq!(sizes.count(size), all - 1, "it is split at once");
        let index = vcpu.index;
        tool.run_wanting_pf(&mut vcpu);
        tool.allow_pfs(index, &[(page + 8, W)]);
        assert_eq!(vcpu.exit(), Exit::Out(0x11));
        assert_eq!(
            sizes.count(size),
            all - 1,
            "and stays so, the other does not"
        );
        if unhook {
            vm.unhook();
        } else {
            tool.deny(page, 0);
        }
        assert_eq!(vcpu.run_until_exit(), Exit::Out(0x11));
        assert_eq!(sizes.count(size), all, "it comes back");
        vm.unhook();
    }
}

fn page_of_2_mib_is_split_and_comes_back(_: &Ctx) {
    let mut vm = TestVm::new();
    two_huge_pages(&vm);
    split_and_recover(&mut vm, HUGE, HUGE + MIB2, "2m");
}

fn page_of_1_gib_is_split_and_comes_back(_: &Ctx) {
    let mut vm = TestVm::new();
    let Some(giant) = Memory::giant() else {
        skip("the host has no page of 1 GiB");
    };
    vm.add_slot(2, GIGABYTE, &giant);
    two_huge_pages(&vm);
    split_and_recover(&mut vm, GIGABYTE, HUGE, "1g");
}

fn page_restricted_before_it_is_touched_is_small(_: &Ctx) {
    let mut vm = TestVm::new();
    two_huge_pages(&vm);
    let mut vcpu = touching(&mut vm, &[&[HUGE + PAGE as u64, HUGE + MIB2 + PAGE as u64]]);
    let sizes = Sizes::of(&vm);
    let mut tool = vm.hook_allowing_all();
    tool.deny(HUGE, ALL);
    let before = sizes.count("2m");
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x11));
    if sizes.count("2m") == before {
        skip("KVM does not map memory by pages of this size here");
    }
    assert_eq!(sizes.count("2m"), before + 1, "the other one alone is huge");
}

fn access_across_pages_of_different_size_is_reported(_: &Ctx) {
    let mut vm = TestVm::new();
    let memory = two_huge_pages(&vm);
    let edge = HUGE + MIB2;
    let mut vcpu = add_code(&mut vm, CODE, |code| {
        emit(code.mov(rsi, edge - 4));
        emit(code.mov(byte_ptr(rsi), 0));
        emit(code.mov(byte_ptr(rsi + 8), 0));
        emit(code.mov(rax, u64::MAX));
        for _ in 0..2 {
            emit(code.out(0x11, al));
            emit(code.mov(qword_ptr(rsi), rax));
        }
    });
    let mut tool = vm.hook_allowing_all();
    let expect = |tool: &mut Tool, vcpu: &mut Vcpu, accesses: &[(u64, u8)], exit| {
        tool.run_wanting_pf(vcpu);
        tool.allow_pfs(0, accesses);
        assert_eq!(vcpu.exit(), exit);
        tool.settle();
    };
    assert_eq!(vcpu.run_until_exit(), Exit::Out(0x11));
    tool.deny(edge, W);
    expect(&mut tool, &mut vcpu, &[(edge, W)], Exit::Out(0x11));
    tool.deny(edge, 0);
    tool.deny(edge - PAGE as u64, W);
    expect(&mut tool, &mut vcpu, &[(edge - 4, W)], Exit::Out(0x10));
    assert_eq!(memory.read(MIB2 - 4, 8), [0xff; 8]);
}
