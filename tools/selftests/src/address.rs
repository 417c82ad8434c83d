// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What vCPUs tell about addresses: TRANSLATE_GVA and GET_MTRR_TYPE.

use kvmi_abi::{
    vcpu::{GetMtrrType, MtrrTypeReply, TranslateGva, TranslateGvaReply, GPA_UNMAPPED},
    Command,
};
use zerocopy::IntoBytes as _;

use crate::{
    guest::{Mode, GIGABYTE, HIGH, HIGH_PAGES, LARGE, LARGE_GPA, LAST32, LAST_PAE},
    harness::{note, skip, test, Ctx, Test},
    tool::{structure, Tool},
    vcpu::Vcpu,
    vm::{Guest, TestVm, MEMORY, SCRATCH},
};

const AREA: &str = "address";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(addresses_of_64_bit_code_are_translated),
    test!(addresses_of_32_bit_code_are_translated),
    test!(addresses_of_code_with_pae_are_translated),
    test!(addresses_without_paging_are_physical),
    test!(translation_follows_the_page_tables),
    test!(vcpus_have_address_spaces_of_their_own),
    test!(without_mtrrs_memory_is_uncached),
    test!(default_memory_type_is_that_of_the_mtrr),
    test!(variable_mtrrs_count),
    test!(fixed_mtrrs_count),
];

#[track_caller]
fn translate(tool: &mut Tool, vcpu: u16, gva: u64) -> u64 {
    let request = TranslateGva { gva };
    let reply = tool.call_vcpu(vcpu, Command::VcpuTranslateGva, request.as_bytes());
    structure::<TranslateGvaReply>(reply).gpa
}

/// Fails the test unless each address is translated as told.
#[track_caller]
fn expect_translations(tool: &mut Tool, vcpu: u16, expected: &[(u64, u64)]) {
    for (gva, gpa) in expected {
        let translated = translate(tool, vcpu, *gva);
        assert_eq!(translated, *gpa, "{gva:#x} -> {translated:#x}");
    }
}

fn addresses_of_64_bit_code_are_translated(_: &Ctx) {
    for mode in [Mode::Long, Mode::Compat32] {
        let mut vm = TestVm::new();
        let mut vcpu = vm.control(Guest::Spin(mode));
        let mut tool = vm.hook_allowing_all();
        vcpu.run();
        expect_translations(
            &mut tool,
            0,
            &[
                (0, 0),
                (0xd901, 0xd901),
                (MEMORY as u64 + 5, MEMORY as u64 + 5),
                (0x3fff_ffff, 0x3fff_ffff),
                // By one entry.
                (GIGABYTE, GIGABYTE),
                (GIGABYTE + 0x1234_5678, GIGABYTE + 0x1234_5678),
                (2 * GIGABYTE, GPA_UNMAPPED),
                (0x7fff_ffff_ffff, GPA_UNMAPPED),
                (LARGE, LARGE_GPA),
                (LARGE + 0x12_3456, LARGE_GPA + 0x12_3456),
                (LARGE + 0x20_0000, GPA_UNMAPPED),
                // Not canonical: bits 47 and 48 differ, although the tables would map it.
                (HIGH & 0x0000_ffff_ffff_ffff, GPA_UNMAPPED),
                (0x0001_0000_0000_0000, GPA_UNMAPPED),
                (0x8000_0000_0000_0000, GPA_UNMAPPED),
                (u64::MAX, GPA_UNMAPPED),
            ],
        );
        for (page, (gpa, flags)) in (0..).zip(HIGH_PAGES) {
            let gva = HIGH + (page << 12);
            let mapped = |offset| {
                if flags == 0 {
                    GPA_UNMAPPED
                } else {
                    gpa + offset
                }
            };
            let cases = [0, 1, 0xfff].map(|offset| (gva + offset, mapped(offset)));
            expect_translations(&mut tool, 0, &cases);
        }
        vcpu.expect_running();
    }
}

fn addresses_of_32_bit_code_are_translated(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Paged32));
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    expect_translations(
        &mut tool,
        0,
        &[
            (0xd900, 0xd900),
            (LAST32 - 1, LAST32 - 1),
            (LAST32, SCRATCH),
            (LAST32 + 0xfff, SCRATCH + 0xfff),
            (LAST32 + 0x1000, GPA_UNMAPPED),
            (0xffff_ffff, GPA_UNMAPPED),
            (0x1_0000_d900, GPA_UNMAPPED),
            (HIGH, GPA_UNMAPPED),
        ],
    );
}

fn addresses_of_code_with_pae_are_translated(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Pae32));
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    expect_translations(
        &mut tool,
        0,
        &[
            (0xd900, 0xd900),
            (LAST_PAE - 1, LAST_PAE - 1),
            (LAST_PAE, LARGE_GPA),
            (LAST_PAE + 0x1f_ffff, LARGE_GPA + 0x1f_ffff),
            (LAST_PAE + 0x20_0000, GPA_UNMAPPED),
            (0xffff_ffff, GPA_UNMAPPED),
            (0x1_0000_d900, GPA_UNMAPPED),
            (HIGH, GPA_UNMAPPED),
        ],
    );
}

fn addresses_without_paging_are_physical(_: &Ctx) {
    for mode in [Mode::Real, Mode::Protected16, Mode::Protected32] {
        let mut vm = TestVm::new();
        let mut vcpu = vm.control(Guest::Spin(mode));
        let mut tool = vm.hook_allowing_all();
        vcpu.run();
        for gva in [0, 1, 0xd900, LAST32, MEMORY as u64, 0xffff_ffff] {
            expect_translations(&mut tool, 0, &[(gva, gva)]);
        }
    }
}

fn translation_follows_the_page_tables(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    // The entry that maps HIGH + 0x1000, found the way the processor does.
    let table = |gpa: u64, tool: &mut Tool| {
        let entry = tool.read(gpa, 8).expect("there is memory");
        u64::from_le_bytes(entry.try_into().expect("eight bytes")) & 0x000f_ffff_ffff_f000
    };
    let (reply, _) = tool.registers(0, &[]).expect("registers can be read");
    let pdpt = table(reply.sregs.cr3 + 8 * 256, &mut tool);
    let pd = table(pdpt, &mut tool);
    let entry = table(pd, &mut tool) + 8;
    let gva = HIGH + 0x1234;
    assert_eq!(translate(&mut tool, 0, gva), GPA_UNMAPPED);
    for page in [SCRATCH, 0x7000, 0xffff_f000] {
        let mapping: u64 = page | 1;
        assert_eq!(tool.write(entry, &mapping.to_le_bytes()), Ok(()));
        assert_eq!(translate(&mut tool, 0, gva), page + 0x234);
    }
    assert_eq!(tool.write(entry, &[0; 8]), Ok(()));
    assert_eq!(translate(&mut tool, 0, gva), GPA_UNMAPPED);
}

fn vcpus_have_address_spaces_of_their_own(_: &Ctx) {
    let mut vm = TestVm::new();
    let modes = [Mode::Long, Mode::Paged32, Mode::Real];
    let mut vcpus = modes.map(|mode| vm.control(Guest::Spin(mode)));
    vcpus.iter_mut().for_each(Vcpu::run);
    let mut tool = vm.hook_allowing_all();
    for _ in 0..5 {
        for (vcpu, gpa) in [(0, LAST32), (1, SCRATCH), (2, LAST32)] {
            assert_eq!(translate(&mut tool, vcpu, LAST32), gpa);
        }
        expect_translations(&mut tool, 0, &[(HIGH, SCRATCH)]);
        expect_translations(&mut tool, 1, &[(LAST32 + 0x1000, GPA_UNMAPPED)]);
        expect_translations(&mut tool, 2, &[(LAST32 + 0x1000, LAST32 + 0x1000)]);
    }
}

const UC: u8 = 0;
const WC: u8 = 1;
const WT: u8 = 4;
const WP: u8 = 5;
const WB: u8 = 6;

const DEFAULT_TYPE: u32 = 0x2ff;
const ENABLE: u64 = 1 << 11;
const ENABLE_FIXED: u64 = 1 << 10;
const FIXED_64K: u32 = 0x250;
const FIXED_16K_A: u32 = 0x259;
const FIXED_4K_C8: u32 = 0x269;

#[track_caller]
fn memory_type(tool: &mut Tool, gpa: u64) -> u8 {
    let request = GetMtrrType { gpa };
    let reply = tool.call_vcpu(0, Command::VcpuGetMtrrType, request.as_bytes());
    let reply: MtrrTypeReply = structure(reply);
    assert_eq!(reply.padding, [0; 7]);
    reply.type_
}

/// A VM, a vCPU that stands still, and a tool.
fn mtrr_vm() -> (TestVm, Vcpu, Tool) {
    let mut vm = TestVm::new();
    let vcpu = vm.control(Guest::Spin(Mode::Long));
    let tool = vm.hook_allowing_all();
    (vm, vcpu, tool)
}

/// Sets MTRRs, and fails the test unless these addresses have the types told.
#[track_caller]
fn expect_types(vcpu: &mut Vcpu, tool: &mut Tool, msrs: &[(u32, u64)], types: &[(u64, u8)]) {
    vcpu.set_msrs(msrs);
    vcpu.run();
    for (gpa, expected) in types {
        assert_eq!(
            memory_type(tool, *gpa),
            *expected,
            "{gpa:#x} with {msrs:x?}"
        );
    }
    vcpu.stop();
}

/// The pair of MSRs number `nth` for `size` bytes, a power of two, from `start` on.
fn variable(nth: u32, start: u64, size: u64, type_: u8) -> [(u32, u64); 2] {
    const ADDRESS_BITS: u64 = (1 << 36) - 1;
    const VALID: u64 = 1 << 11;
    let msr = 0x200 + 2 * nth;
    let mask = ADDRESS_BITS & !(size - 1);
    [(msr, start | u64::from(type_)), (msr + 1, mask | VALID)]
}

fn without_mtrrs_memory_is_uncached(_: &Ctx) {
    let (_vm, mut vcpu, mut tool) = mtrr_vm();
    let cpuid = vcpu.with(|fd| fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES));
    let cpuid = cpuid.expect("KVM_GET_CPUID2");
    let mut leaves = cpuid.as_slice().iter();
    if !leaves.any(|leaf| leaf.function == 1 && leaf.edx & 1 << 12 != 0) {
        skip("no MTRRs here");
    }
    let types = [(0, UC), (0xa_0000, UC), (0x1000_0000, UC)];
    let off = [(DEFAULT_TYPE, WB.into())];
    expect_types(&mut vcpu, &mut tool, &off, &types);
    // Also if the others say something else.
    let mut others = variable(0, 0x1000_0000, 1 << 20, WT).to_vec();
    others.extend([
        (FIXED_64K, 0x0606_0606_0606_0606),
        (DEFAULT_TYPE, ENABLE_FIXED | 6),
    ]);
    expect_types(&mut vcpu, &mut tool, &others, &types);
}

fn default_memory_type_is_that_of_the_mtrr(_: &Ctx) {
    let (_vm, mut vcpu, mut tool) = mtrr_vm();
    for type_ in [WB, UC, WC, WT, WP] {
        let msrs = [(DEFAULT_TYPE, ENABLE | u64::from(type_))];
        let everywhere = [0, 0xfff, 0xa_0000, MEMORY as u64, 0x8_0000_0000];
        let types = everywhere.map(|gpa| (gpa, type_));
        expect_types(&mut vcpu, &mut tool, &msrs, &types);
    }
}

fn variable_mtrrs_count(_: &Ctx) {
    const MIB: u64 = 1 << 20;
    let (_vm, mut vcpu, mut tool) = mtrr_vm();
    let mut msrs = vec![(DEFAULT_TYPE, ENABLE | u64::from(WB))];
    msrs.extend(variable(0, 256 * MIB, 16 * MIB, UC));
    msrs.extend(variable(1, 512 * MIB, 2 * MIB, WT));
    msrs.extend(variable(2, 1024 * MIB, 4096, WC));
    let types = [
        (256 * MIB - 1, WB),
        (256 * MIB, UC),
        (272 * MIB - 1, UC),
        (272 * MIB, WB),
        (512 * MIB + 4097, WT),
        (514 * MIB, WB),
        (1024 * MIB, WC),
        (1024 * MIB + 4095, WC),
        (1024 * MIB + 4096, WB),
        (0, WB),
    ];
    expect_types(&mut vcpu, &mut tool, &msrs, &types);

    // Of several that match, uncached wins, and write-through wins over write-back.
    let mut msrs = vec![(DEFAULT_TYPE, ENABLE | u64::from(WP))];
    msrs.extend(variable(0, 256 * MIB, 16 * MIB, WB));
    msrs.extend(variable(1, 256 * MIB, 8 * MIB, WT));
    msrs.extend(variable(2, 256 * MIB, 4 * MIB, UC));
    let types = [
        (256 * MIB, UC),
        (261 * MIB, WT),
        (265 * MIB, WB),
        (300 * MIB, WP),
        (1024 * MIB, WP),
    ];
    expect_types(&mut vcpu, &mut tool, &msrs, &types);

    // One that is not valid does not count.
    let types = [(256 * MIB, WT), (1024 * MIB, WP)];
    expect_types(&mut vcpu, &mut tool, &[(0x205, 0)], &types);
}

fn fixed_mtrrs_count(_: &Ctx) {
    let (_vm, mut vcpu, mut tool) = mtrr_vm();
    let fixed = [
        // From the lowest address on: WB, UC, WC, WT, WP, WB, UC, WC
        (FIXED_64K, 0x0100_0605_0401_0006),
        // From 0xa0000 on, 16 KiB each
        (FIXED_16K_A, 0x0006_0504_0100_0605),
        // From 0xc8000 on, 4 KiB each
        (FIXED_4K_C8, 0x0504_0100_0605_0401),
    ];
    let types = [
        (0, WB),
        (0xffff, WB),
        (0x1_0000, UC),
        (0x2_0000, WC),
        (0x3_8000, WT),
        (0x4_ffff, WP),
        (0x7_ffff, WC),
        (0xa_0000, WP),
        (0xa_3fff, WP),
        (0xa_4000, WB),
        (0xa_8000, UC),
        (0xb_ffff, UC),
        (0xc_8000, WC),
        (0xc_8fff, WC),
        (0xc_9000, WT),
        (0xc_ffff, WP),
        (0x10_0000, WT),
    ];
    let mut msrs = fixed.to_vec();
    msrs.push((DEFAULT_TYPE, ENABLE | ENABLE_FIXED | u64::from(WT)));
    // They take precedence over variable ones.
    msrs.extend(variable(0, 0, 1 << 19, UC));
    expect_types(&mut vcpu, &mut tool, &msrs, &types);
    note!("fixed ranges off");
    let off = [(DEFAULT_TYPE, ENABLE | u64::from(WT)), (0x201, 0)];
    let types = types.map(|(gpa, _)| (gpa, WT));
    expect_types(&mut vcpu, &mut tool, &off, &types);
}
