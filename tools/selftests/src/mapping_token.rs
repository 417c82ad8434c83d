// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Who may map pages of another VM, for how long, and what those are told who may not.

use std::time::{Duration, Instant};

use kvmi_abi::{
    hypercall::{MEM_MAP, MEM_MAP_MANY, MEM_UNMAP, MEM_UNMAP_MANY},
    token::MapToken,
    Command, KvmiError,
};
use rustix::{io::Errno, thread::CapabilitySet};

use crate::{
    access_tool::PLAIN,
    harness::{test, Ctx, Test},
    mapping_tool::{
        scene, Introspector, ARRAY, E2BIG, EALREADY, EFAULT, EINVAL, ENOENT, ENOSYS, EPERM,
        PAGE_OF_TARGET, TOKEN, WINDOW,
    },
    memory::Memory,
    role::Vmm,
    sys,
    tool::Tool,
    util::wait_for,
    vm::{TestVm, MEMORY, PAGE},
};

const AREA: &str = "mapping_token";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(token_is_good_for_one_mapping),
    test!(token_that_was_of_no_use_can_be_presented_again),
    test!(there_are_eight_tokens_at_a_time),
    test!(tokens_expire_after_three_seconds),
    test!(tokens_end_with_their_session),
    test!(token_may_cross_pages),
    test!(errors_of_hypercalls_are_those_of_the_protocol),
    test!(only_a_kernel_may_map),
    test!(only_an_introspector_may_map),
    test!(introspector_is_not_introspected),
    test!(target_that_is_dead_lends_nothing).destructive(),
];

fn token_is_good_for_one_mapping(_: &Ctx) {
    let (_target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), 0);
    let next = WINDOW + PAGE as u64;
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, next), ENOENT);
    let mut wrong = tool.map_token();
    wrong.bytes[31] ^= 1;
    for unknown in [wrong, MapToken::default()] {
        assert_eq!(introspector.map(&unknown, PAGE_OF_TARGET, next), ENOENT);
    }
    assert_eq!(introspector.load(next), !next);
}

fn token_that_was_of_no_use_can_be_presented_again(_: &Ctx) {
    let (_target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    assert_eq!(introspector.map(&token, 0x4000_0000, WINDOW), ENOENT);
    assert_eq!(
        introspector.map(&token, PAGE_OF_TARGET, 0x4000_0000),
        EFAULT
    );
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), 0);
    let token = tool.map_token();
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), EALREADY);
    assert_eq!(
        introspector.map(&token, PAGE_OF_TARGET, WINDOW + PAGE as u64),
        0
    );
}

fn there_are_eight_tokens_at_a_time(_: &Ctx) {
    let (_target, mut tool, mut introspector) = scene();
    let tokens: Vec<_> = (0..8).map(|_| tool.map_token()).collect();
    assert!(tool.try_map_token(0).is_err_and(|e| e == KvmiError::Again));
    assert_eq!(introspector.map(&tokens[3], PAGE_OF_TARGET, WINDOW), 0);
    tool.map_token();
    assert!(tool.try_map_token(0).is_err_and(|e| e == KvmiError::Again));
    for (nth, token) in tokens.iter().enumerate() {
        let distinct = tokens.iter().filter(|other| other.bytes == token.bytes);
        assert_eq!(distinct.count(), 1, "token {nth}");
    }
    let padded = tool.call(Command::VmGetMapToken, &[0, 0, 0, 0, 1]);
    assert_eq!(padded, Err(KvmiError::Inval));
    assert!(tool.try_map_token(2).is_err_and(|e| e == KvmiError::Inval));
}

fn tokens_expire_after_three_seconds(_: &Ctx) {
    const LIFETIME: Duration = Duration::from_secs(3);
    const MARGIN: Duration = Duration::from_millis(100);
    let (_target, mut tool, mut introspector) = scene();
    let before = Instant::now();
    let early = tool.map_token();
    let late = tool.map_token();
    let others: Vec<_> = (0..6).map(|_| tool.map_token()).collect();
    let after = Instant::now();
    assert_eq!(others.len(), 6);
    // Nobody presents them, and nobody asks for others: a place is free when it is time.
    std::thread::sleep((before + LIFETIME - MARGIN).saturating_duration_since(Instant::now()));
    let mapped = introspector.map(&early, PAGE_OF_TARGET, WINDOW);
    // Unless the host is so slow that it may have come too late.
    if before.elapsed() < LIFETIME {
        assert_eq!(mapped, 0);
    }
    std::thread::sleep((after + LIFETIME + MARGIN).saturating_duration_since(Instant::now()));
    let next = WINDOW + PAGE as u64;
    assert_eq!(introspector.map(&late, PAGE_OF_TARGET, next), ENOENT);
    for _ in 0..8 {
        tool.map_token();
    }
}

fn tokens_end_with_their_session(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    target.unhook();
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), ENOENT);
    let mut tool = target.hook_allowing_all();
    let token = tool.map_token();
    drop(tool);
    wait_for("the token is gone", || {
        introspector.map(&token, PAGE_OF_TARGET, 0x4000_0000) == ENOENT
    });
    target.unhook();
}

fn token_may_cross_pages(_: &Ctx) {
    let (_target, mut tool, mut introspector) = scene();
    for offset in [1, 31, 32] {
        let token = tool.map_token();
        let gva = PLAIN + 2 * PAGE as u64 - offset;
        introspector.vm.memory.write(gva, &token.bytes);
        let mapped = introspector.call(MEM_MAP, [gva, PAGE_OF_TARGET, WINDOW]);
        assert_eq!(mapped, 0, "{offset} bytes before the end");
        assert_eq!(introspector.unmap(WINDOW), 0);
    }
}

fn errors_of_hypercalls_are_those_of_the_protocol(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    let unmapped = 0x7fff_0000_0000;
    for (nr, args, error) in [
        (MEM_MAP, [unmapped, PAGE_OF_TARGET, WINDOW], ENOENT),
        (MEM_MAP, [TOKEN, PAGE_OF_TARGET + 1, WINDOW], EINVAL),
        (MEM_MAP, [TOKEN, PAGE_OF_TARGET, WINDOW + 0x800], EINVAL),
        (MEM_MAP, [TOKEN, u64::MAX - 4095, WINDOW], ENOENT),
        (MEM_MAP, [TOKEN, PAGE_OF_TARGET, MEMORY as u64], EFAULT),
        (MEM_UNMAP, [WINDOW, 0, 0], ENOENT),
        (MEM_UNMAP, [WINDOW + 1, 0, 0], EINVAL),
        (MEM_UNMAP, [u64::MAX - 4095, 0, 0], ENOENT),
        (MEM_MAP_MANY, [TOKEN, ARRAY, 0], EINVAL),
        (MEM_MAP_MANY, [TOKEN, ARRAY, 257], E2BIG),
        (MEM_MAP_MANY, [TOKEN, ARRAY + 8, 1], EINVAL),
        (MEM_MAP_MANY, [TOKEN, 0x4000_0000, 1], ENOENT),
        (MEM_UNMAP_MANY, [ARRAY, 0, 0], EINVAL),
        (MEM_UNMAP_MANY, [ARRAY, 513, 0], E2BIG),
        (34, [0; 3], ENOSYS),
        (37, [0; 3], ENOSYS),
    ] {
        let result = introspector.present(&mut tool, |guest, token| {
            guest.vm.memory.write(TOKEN, &token.bytes);
            guest.call(nr, args)
        });
        assert_eq!(result, error, "{nr} {args:x?}");
    }
    let rom = Memory::new(PAGE);
    target.add_rom(1, 0x100_0000, &rom);
    introspector.vm.add_rom(1, 0x100_0000, &rom);
    assert_eq!(introspector.map_page(&mut tool, 0x100_0000, WINDOW), EPERM);
    let refused = introspector.map_page(&mut tool, PAGE_OF_TARGET, 0x100_0000);
    assert_eq!(refused, EFAULT);
    // To read it is fine.
    let token = tool.read_only_token();
    assert_eq!(introspector.map(&token, 0x100_0000, WINDOW), 0);
}

fn only_a_kernel_may_map(_: &Ctx) {
    let (_target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    introspector.vm.memory.write(TOKEN, &token.bytes);
    let result = introspector.call_from_user_mode(MEM_MAP, [TOKEN, PAGE_OF_TARGET, WINDOW]);
    assert_eq!(result, EPERM);
    assert_eq!(introspector.load(WINDOW), !WINDOW);
    assert_eq!(introspector.map_page(&mut tool, PAGE_OF_TARGET, WINDOW), 0);
}

fn only_an_introspector_may_map(_: &Ctx) {
    let (target, mut tool, mut introspector) = scene();
    let token = tool.map_token();
    let mut other = Introspector::ordinary(TestVm::new());
    assert_eq!(other.map(&token, PAGE_OF_TARGET, WINDOW), ENOSYS);
    assert_eq!(introspector.appoint(0), Ok(()));
    assert_eq!(introspector.map(&token, PAGE_OF_TARGET, WINDOW), ENOSYS);
    assert_eq!(introspector.appoint(0), Err(Errno::NOENT));
    assert_eq!(introspector.appoint(2), Err(Errno::INVAL));
    assert_eq!(introspector.appoint(1), Ok(()));
    assert_eq!(introspector.appoint(1), Err(Errno::EXIST));
    // Not for those who could not introspect themselves.
    let dev = sys::open_dev();
    let vm_fd = other.vm.raw_fd();
    let appoint = || sys::introspector(&dev, vm_fd, 1);
    let refused = sys::without_capability(CapabilitySet::SYS_ADMIN, appoint);
    assert_eq!(refused, Err(Errno::PERM));
    // Nor has the target such a call.
    drop(tool);
    target.unhook();
}

fn introspector_is_not_introspected(_: &Ctx) {
    let (target, _tool, introspector) = scene();
    let tool = Tool::new();
    let refused = sys::attach(sys::open_dev(), introspector.vm.raw_fd(), tool.vmm_fd());
    assert_eq!(refused, Err(Errno::EXIST));
    let refused = sys::introspector(sys::open_dev(), target.raw_fd(), 1);
    assert_eq!(refused, Err(Errno::EXIST));
}

fn target_that_is_dead_lends_nothing(_: &Ctx) {
    let mut introspector = Introspector::new();
    let mut vmm = Vmm::start(1, 0);
    let mut tool = Tool::new();
    let dev = sys::open_dev();
    sys::allow_all(&dev);
    sys::attach(&dev, vmm.vm_fd(), tool.vmm_fd()).expect("the VM can be attached");
    // Its VM is still there, as there is a descriptor of it here.
    vmm.process.kill();
    let mapped = introspector.map_page(&mut tool, PAGE_OF_TARGET, WINDOW);
    assert_eq!(mapped, ENOENT);
    assert_eq!(introspector.load(WINDOW), 0);
}
