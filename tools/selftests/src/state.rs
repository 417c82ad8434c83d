// SPDX-License-Identifier: GPL-2.0 OR MIT

//! vCPU commands that tell simple things: GET_INFO, CONTROL_EVENTS, GET_CPUID, GET_XCR.

use kvm_bindings::{kvm_cpuid_entry2, kvm_xcr, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};
use kvmi_abi::{
    command::ControlEvents,
    vcpu::{CpuidReply, GetXcr},
    Command, Event, KvmiError, Scope,
};
use zerocopy::IntoBytes as _;

use crate::{
    guest::Mode,
    harness::{note, test, Ctx, Test},
    sys,
    vcpu::Vcpu,
    vm::{Guest, TestVm},
};

const AREA: &str = "state";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(tsc_speed_is_that_of_kvm),
    test!(only_served_vcpu_events_can_be_controlled),
    test!(vcpu_event_must_be_allowed_to_be_controlled),
    test!(every_padding_byte_must_be_zero),
    test!(cpuid_is_that_of_the_guest),
    test!(cpuid_of_a_missing_leaf_is_enoent),
    test!(xcr0_is_that_of_the_guest),
    test!(other_xcrs_are_invalid),
];

const SPIN: Guest = Guest::Spin(Mode::Long);

fn tsc_speed_is_that_of_kvm(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(SPIN);
    let mut tool = vm.hook_allowing_all();
    let khz = vcpu.with(|fd| fd.get_tsc_khz()).expect("KVM_GET_TSC_KHZ");
    assert_ne!(khz, 0);
    vcpu.run();
    assert_eq!(tool.vcpu_info(0), Ok(u64::from(khz) * 1000));
    vcpu.stop();
    // Not all hosts can.
    if vcpu.with(move |fd| fd.set_tsc_khz(khz / 2)).is_ok() {
        let khz = vcpu.with(|fd| fd.get_tsc_khz()).expect("KVM_GET_TSC_KHZ");
        note!("TSC scaled to {khz} kHz");
        vcpu.run();
        assert_eq!(tool.vcpu_info(0), Ok(u64::from(khz) * 1000));
    }
}

fn only_served_vcpu_events_can_be_controlled(_: &Ctx) {
    let vm = TestVm::counting(2);
    let mut tool = vm.hook_allowing_all();
    for id in (0..64).chain([0x101, 0x109, 0x8001, u16::MAX]) {
        let event = Event::from_id(id).filter(|e| e.is_served() && e.scope() == Scope::Vcpu);
        for enable in [1, 1, 0, 0] {
            let expected = event.map(|_| ()).ok_or(KvmiError::Inval);
            let control = tool.control_vcpu_event(1, id, enable);
            assert_eq!(control, expected, "event {id}");
        }
        for enable in [2, 0x80, 0xff] {
            let control = tool.control_vcpu_event(1, id, enable);
            assert_eq!(control, Err(KvmiError::Inval), "event {id}");
        }
    }
    for event in [Event::Pause, Event::Trap] {
        assert_eq!(tool.control_vcpu_event(0, event.id(), 0), Ok(()));
    }
    // These two come because of a command, whether enabled or not.
    let paused = tool.pause(0);
    tool.resume(&paused);
    vm.expect_progress();
}

fn vcpu_event_must_be_allowed_to_be_controlled(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    for event in [Event::Pause, Event::Trap] {
        let id = event.id();
        assert_eq!(sys::event(&vm, 0, id.into()), Ok(()));
        for enable in [0, 1] {
            let control = tool.control_vcpu_event(0, id, enable);
            assert_eq!(control, Err(KvmiError::Perm), "{event:?}");
        }
        // Its arguments are looked at first.
        let control = tool.control_vcpu_event(0, id, 2);
        assert_eq!(control, Err(KvmiError::Inval), "{event:?}");
        assert_eq!(sys::event(&vm, 1, id.into()), Ok(()));
        assert_eq!(tool.control_vcpu_event(0, id, 1), Ok(()));
    }
}

fn every_padding_byte_must_be_zero(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let control = ControlEvents {
        event_id: Event::Pause.id(),
        enable: 1,
        ..Default::default()
    };
    let cases = [
        (Command::VcpuControlEvents, control.as_bytes(), 3..8),
        (Command::VcpuGetXcr, &[0; 8][..], 1..8),
        (Command::VcpuGetRegisters, &[0; 8], 2..8),
    ];
    for (command, good, padding) in cases {
        assert!(tool.call_vcpu(0, command, good).is_ok(), "{command:?}");
        for at in padding {
            for value in [1, 0x80, 0xff] {
                let mut bad = good.to_vec();
                bad[at] = value;
                let reply = tool.call_vcpu(0, command, &bad);
                assert_eq!(reply, Err(KvmiError::Inval), "{command:?}, byte {at}");
            }
        }
    }
    vm.expect_progress();
}

/// Leaves with made-up contents, in a range that nobody interprets.
const LEAVES: [kvm_cpuid_entry2; 3] = {
    const fn leaf(function: u32, index: u32, flags: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax: 0x1111_1111 * (index + 1),
            ebx: 0x2222_0000 + function % 16,
            ecx: 0xffff_ffff,
            edx: 0x8000_0001,
            padding: [0; 3],
        }
    }
    const SIGNIFICANT: u32 = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    [
        leaf(0x4000_0205, 0, 0),
        leaf(0x4000_0206, 0, SIGNIFICANT),
        leaf(0x4000_0206, 3, SIGNIFICANT),
    ]
};

/// Adds [`LEAVES`] to the guest's CPUID; returns all of it as KVM tells it.
#[track_caller]
fn add_leaves(vcpu: &mut Vcpu) -> Vec<kvm_cpuid_entry2> {
    const MANY: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
    let read = |fd: &mut kvm_ioctls::VcpuFd| fd.get_cpuid2(MANY);
    let mut entries = vcpu.with(read).expect("KVM_GET_CPUID2").as_slice().to_vec();
    entries.truncate(MANY - LEAVES.len());
    entries.extend(LEAVES);
    let cpuid = CpuId::from_entries(&entries).expect("a list of leaves");
    let set = vcpu.with(move |fd| fd.set_cpuid2(&cpuid));
    set.expect("KVM_SET_CPUID2");
    let entries = vcpu.with(read).expect("KVM_GET_CPUID2");
    entries.as_slice().to_vec()
}

fn cpuid_is_that_of_the_guest(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(SPIN);
    let entries = add_leaves(&mut vcpu);
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let mut compared = 0;
    // Without those that depend on other state, or on the moment.
    let stable = |function| ![1, 5, 7, 0xb, 0xd, 0x1f, 0x4000_0001].contains(&function);
    for entry in entries.iter().filter(|entry| stable(entry.function)) {
        let expected = CpuidReply {
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        };
        let reply = tool.cpuid(0, entry.function, entry.index);
        assert_eq!(reply, Ok(expected), "leaf {:#x}", entry.function);
        compared += 1;
    }
    note!("{compared} of {} leaves compared", entries.len());
    assert!(compared > LEAVES.len());
    // Leaf 1 depends on CR4 alone: the rest of it can be compared.
    const OSXSAVE: u32 = 1 << 27;
    let leaf = entries.iter().find(|entry| entry.function == 1);
    let (leaf, reply) = (leaf.expect("leaf 1"), tool.cpuid(0, 1, 0).expect("leaf 1"));
    assert_eq!((leaf.eax, leaf.edx), (reply.eax, reply.edx));
    assert_eq!(leaf.ecx & !OSXSAVE, reply.ecx & !OSXSAVE);
    // The index does not matter where it is not significant.
    let first = tool.cpuid(0, LEAVES[0].function, 0);
    assert_eq!(tool.cpuid(0, LEAVES[0].function, 77), first);
}

fn cpuid_of_a_missing_leaf_is_enoent(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(SPIN);
    add_leaves(&mut vcpu);
    // Real CPUs answer a leaf out of range with the highest one; that is not what is asked for.
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    for (function, index) in [
        (0x4000_0207, 0),
        (0x4000_0206, 1),
        (0x4000_0206, 4),
        (0x1234_5678, 0),
        (0x8fff_ffff, 0),
        (0xffff_ffff, u32::MAX),
    ] {
        let reply = tool.cpuid(0, function, index);
        assert_eq!(reply, Err(KvmiError::NoEnt), "leaf {function:#x}.{index}");
    }
    assert!(tool.cpuid(0, 0x4000_0206, 3).is_ok());
}

fn xcr0_is_that_of_the_guest(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(SPIN);
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    assert_eq!(tool.xcr0(0), 1);
    for value in [3, 7, 1] {
        vcpu.stop();
        let set = vcpu.with(move |fd| {
            let mut xcrs = fd.get_xcrs()?;
            xcrs.nr_xcrs = 1;
            xcrs.xcrs[0] = kvm_xcr {
                value,
                ..Default::default()
            };
            fd.set_xcrs(&xcrs)
        });
        vcpu.run();
        match set {
            Ok(()) => assert_eq!(tool.xcr0(0), value),
            Err(error) => note!("XCR0 cannot be {value} here: {error}"),
        }
    }
}

fn other_xcrs_are_invalid(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    for xcr in 1..=u8::MAX {
        let request = GetXcr {
            xcr,
            ..Default::default()
        };
        let reply = tool.call_vcpu(0, Command::VcpuGetXcr, request.as_bytes());
        assert_eq!(reply, Err(KvmiError::Inval), "XCR{xcr}");
    }
    let reply = tool.call_vcpu(0, Command::VcpuGetXcr, &[]);
    assert_eq!(reply.map(|data| data.len()), Ok(8));
}
