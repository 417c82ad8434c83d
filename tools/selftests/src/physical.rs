// SPDX-License-Identifier: GPL-2.0 OR MIT

//! VM_READ_PHYSICAL and VM_WRITE_PHYSICAL: the guest's memory as the tool sees it.

use kvmi_abi::{Command, KvmiError};
use zerocopy::IntoBytes as _;

use crate::{
    harness::{test, Ctx, Test},
    memory::Memory,
    sys,
    tool::range,
    util::wait_for,
    vm::{TestVm, MEMORY, PAGE, SCRATCH, STOP},
};

const AREA: &str = "physical";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(read_gives_what_is_in_memory),
    test!(read_follows_the_running_guest),
    test!(write_changes_just_the_named_bytes),
    test!(running_guest_sees_what_is_written),
    test!(ranges_must_be_inside_a_page),
    test!(addresses_without_memory_are_enoent),
    test!(new_and_removed_slots_are_noticed),
    test!(rom_can_be_read_but_not_written),
    test!(write_is_marked_in_the_dirty_log_and_read_is_not),
];

fn read_gives_what_is_in_memory(ctx: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    let mut rng = ctx.rng();
    let contents = rng.bytes(2 * PAGE);
    vm.memory.write(SCRATCH, &contents);
    let ranges = [
        (0, 4096),
        (0, 1),
        (4095, 1),
        (4096, 4096),
        (1, 4095),
        (4094, 2),
    ];
    let random = (0..100).map(|_| {
        let at = rng.below(PAGE);
        (at, 1 + rng.below(PAGE - at))
    });
    for (at, len) in ranges.into_iter().chain(random) {
        let data = tool.read(SCRATCH + at as u64, len as u16);
        assert_eq!(
            data.as_deref(),
            Ok(&contents[at..at + len]),
            "{len} at {at}"
        );
    }
    // The last byte there is.
    vm.memory.write(MEMORY as u64 - 1, &[9]);
    assert_eq!(tool.read(MEMORY as u64 - 1, 1), Ok(vec![9]));
}

fn read_follows_the_running_guest(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let mut counter = || {
        let bytes = tool.read(0x3000, 4).expect("the counter can be read");
        u32::from_ne_bytes(bytes.try_into().expect("four bytes"))
    };
    let before = vm.count(0);
    let seen = counter();
    let after = vm.count(0);
    // The counter may wrap around.
    assert!(seen.wrapping_sub(before) <= after.wrapping_sub(before));
    wait_for("the tool sees the guest count", || counter() != seen);
}

fn write_changes_just_the_named_bytes(ctx: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    let mut rng = ctx.rng();
    let mut expected = vec![0; 3 * PAGE];
    let page = SCRATCH + PAGE as u64;
    let ranges = [(0, 4096), (0, 1), (4095, 1), (1, 4095)];
    let random = (0..100).map(|_| {
        let at = rng.below(PAGE);
        (at, 1 + rng.below(PAGE - at))
    });
    let ranges: Vec<_> = ranges.into_iter().chain(random).collect();
    for (at, len) in ranges {
        let data = rng.bytes(len);
        assert_eq!(tool.write(page + at as u64, &data), Ok(()));
        expected[PAGE + at..][..len].copy_from_slice(&data);
        let now = vm.memory.read(SCRATCH, 3 * PAGE);
        assert!(now == expected, "memory after writing {len} bytes at {at}");
    }
}

fn running_guest_sees_what_is_written(_: &Ctx) {
    let vm = TestVm::counting(2);
    let mut tool = vm.hook_allowing_all();
    vm.expect_progress();
    assert_eq!(tool.write(STOP, &[1]), Ok(()));
    wait_for("the guest stops", || vm.has_ended(0) && vm.has_ended(1));
    let counts = [vm.count(0), vm.count(1)].map(u32::to_ne_bytes);
    assert_eq!(tool.read(0x3000, 4).as_deref(), Ok(&counts[0][..]));
    assert_eq!(tool.read(0x3040, 4).as_deref(), Ok(&counts[1][..]));
}

fn ranges_must_be_inside_a_page(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    vm.memory.fill(SCRATCH, 2 * PAGE, 0x77);
    let bad = [
        (SCRATCH, 0),
        (SCRATCH, 4097),
        (SCRATCH, u16::MAX),
        (SCRATCH + 1, 4096),
        (SCRATCH + 4095, 2),
        (SCRATCH + 4096 - 8, 9),
        (u64::MAX, 2),
        (u64::MAX - 6, 8),
        (u64::MAX, 0),
    ];
    for (gpa, size) in bad {
        let read = tool.call(Command::VmReadPhysical, range(gpa, size).as_bytes());
        assert_eq!(read, Err(KvmiError::Inval), "{size} bytes at {gpa:#x}");
        // As much data as a message can have; more could only be cut off.
        let data = vec![0; usize::from(size).min(8000)];
        if data.len() == usize::from(size) {
            let write = tool.write(gpa, &data);
            assert_eq!(write, Err(KvmiError::Inval), "{size} bytes at {gpa:#x}");
        }
    }
    assert!(vm.memory.read(SCRATCH, 2 * PAGE) == [0x77; 2 * PAGE]);
}

fn addresses_without_memory_are_enoent(_: &Ctx) {
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    let end = MEMORY as u64;
    let holes = [end, end + 4095, 0xfee0_0000, 1 << 40, 1 << 52, 1 << 63];
    for gpa in holes.into_iter().chain([u64::MAX, u64::MAX - 4095]) {
        assert_eq!(tool.read(gpa, 1), Err(KvmiError::NoEnt), "read at {gpa:#x}");
        let write = tool.write(gpa, &[1]);
        assert_eq!(write, Err(KvmiError::NoEnt), "write at {gpa:#x}");
    }
    assert_eq!(tool.read(end - 1, 1), Ok(vec![0]));
}

fn new_and_removed_slots_are_noticed(_: &Ctx) {
    const GPA: u64 = 0x1000_0000;
    let vm = TestVm::new();
    let mut tool = vm.hook_allowing_all();
    let slot = Memory::new(4 * PAGE);
    slot.fill(0, 4 * PAGE, 0x3c);
    assert_eq!(tool.read(GPA, 4096), Err(KvmiError::NoEnt));
    for _ in 0..10 {
        vm.add_slot(1, GPA, &slot);
        assert_eq!(tool.read(GPA, 4096), Ok(vec![0x3c; 4096]));
        assert_eq!(tool.read(GPA + 4 * 4096, 1), Err(KvmiError::NoEnt));
        vm.remove_slot(1);
        assert_eq!(tool.read(GPA, 4096), Err(KvmiError::NoEnt));
        assert_eq!(tool.write(GPA, &[0; 16]), Err(KvmiError::NoEnt));
    }
    assert!(slot.read(0, 4 * PAGE) == [0x3c; 4 * PAGE]);
}

fn rom_can_be_read_but_not_written(_: &Ctx) {
    const GPA: u64 = 0xf_0000_0000;
    let vm = TestVm::new();
    let rom = Memory::new(2 * PAGE);
    rom.fill(0, 2 * PAGE, 0x90);
    vm.add_rom(1, GPA, &rom);
    let mut tool = vm.hook_allowing_all();
    for page in [GPA, GPA + 4096] {
        assert_eq!(tool.read(page, 4096), Ok(vec![0x90; 4096]));
        assert_eq!(tool.write(page + 8, &[0; 8]), Err(KvmiError::NoEnt));
    }
    assert!(rom.read(0, 2 * PAGE) == [0x90; 2 * PAGE]);
}

fn write_is_marked_in_the_dirty_log_and_read_is_not(_: &Ctx) {
    let vm = TestVm::logging();
    let mut tool = vm.hook_allowing_all();
    vm.dirty_pages();
    let (first, second) = (0x1_0000 / PAGE, MEMORY / PAGE - 1);
    let address = |page: usize| (page * PAGE) as u64;

    assert!(tool.read(address(first), 4096).is_ok());
    assert_eq!(
        tool.write(address(first) + 4090, &[1; 7]),
        Err(KvmiError::Inval)
    );
    assert_eq!(vm.dirty_pages(), []);

    assert_eq!(tool.write(address(first) + 4090, &[1; 6]), Ok(()));
    assert_eq!(tool.write(address(second), &[1; 4096]), Ok(()));
    assert_eq!(vm.dirty_pages(), [first, second]);
    assert_eq!(vm.dirty_pages(), []);
    // Also by the next session.
    vm.unhook();
    let mut tool = vm.hook();
    sys::allow_all(&vm);
    assert_eq!(tool.write(address(second), &[2]), Ok(()));
    assert_eq!(vm.dirty_pages(), [second]);
}
