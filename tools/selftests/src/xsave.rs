// SPDX-License-Identifier: GPL-2.0 OR MIT

//! GET_XSAVE and SET_XSAVE.

use kvmi_abi::{vcpu::XSAVE_SIZE, Command, KvmiError};

use crate::{
    guest::{xmm_value, Mode},
    harness::{note, test, Ctx, Test},
    sys,
    tool::Tool,
    util::wait_for,
    vcpu::Vcpu,
    vm::{Guest, TestVm},
};

const AREA: &str = "xsave";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(xsave_is_that_of_kvm),
    test!(what_was_set_can_be_read),
    test!(guest_sees_what_was_set),
    test!(set_takes_effect_during_an_event),
    test!(state_that_kvm_refuses_is_invalid),
    test!(state_must_be_complete),
    test!(vcpus_have_states_of_their_own),
];

const MXCSR: usize = 24;
const XMM0: usize = 160;
/// The header of what follows the legacy area: which components there are.
const XSTATE_BV: usize = 512;
/// x87 and SSE
const LEGACY: u8 = 3;

#[track_caller]
fn get(tool: &mut Tool, vcpu: u16) -> Vec<u8> {
    let reply = tool.call_vcpu(vcpu, Command::VcpuGetXsave, &[]);
    let state = reply.expect("the state can be read");
    assert_eq!(state.len(), XSAVE_SIZE);
    state
}

#[track_caller]
fn set(tool: &mut Tool, vcpu: u16, state: &[u8]) -> Result<(), KvmiError> {
    crate::tool::nothing(tool.call_vcpu(vcpu, Command::VcpuSetXsave, state))
}

/// `KVM_GET_XSAVE`
#[track_caller]
fn of_kvm(vcpu: &mut Vcpu) -> Vec<u8> {
    let xsave = vcpu.with(|fd| fd.get_xsave()).expect("KVM_GET_XSAVE");
    // SAFETY: an array of numbers.
    unsafe { sys::bytes_of(&xsave.region) }.to_vec()
}

/// Fails the test unless KVM says that this is the vCPU's state.
#[track_caller]
fn expect_that_of_kvm(vcpu: &mut Vcpu, state: &[u8]) {
    let kvm = of_kvm(vcpu);
    assert_eq!(state.len(), kvm.len());
    let differences: Vec<_> = (0..kvm.len())
        .filter(|&at| state[at] != kvm[at])
        .map(|at| (at, state[at], kvm[at]))
        .collect();
    assert_eq!(differences, [], "not what KVM_GET_XSAVE says");
}

/// The state with another XMM0.
fn with_xmm0(mut state: Vec<u8>, value: &[u8; 16]) -> Vec<u8> {
    state[XMM0..XMM0 + 16].copy_from_slice(value);
    state[XSTATE_BV] |= LEGACY;
    state
}

fn xsave_is_that_of_kvm(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    let mut tool = vm.hook_allowing_all();
    for value in [0, 0x5a, 0xff] {
        // Something that tells this state from one just initialized.
        let set = vcpu.with(move |fd| {
            let mut fpu = fd.get_fpu()?;
            fpu.xmm[0] = [value; 16];
            fpu.xmm[15] = [!value; 16];
            fd.set_fpu(&fpu)
        });
        set.expect("KVM_SET_FPU");
        vcpu.run();
        let state = get(&mut tool, 0);
        vcpu.stop();
        expect_that_of_kvm(&mut vcpu, &state);
        assert_eq!(state[XMM0..XMM0 + 16], [value; 16]);
    }
}

fn what_was_set_can_be_read(ctx: &Ctx) {
    let mut rng = ctx.rng();
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let first = get(&mut tool, 0);
    assert_eq!(set(&mut tool, 0, &first), Ok(()));
    assert!(
        get(&mut tool, 0) == first,
        "setting what is there changes it"
    );
    for _ in 0..20 {
        let value = rng.bytes(16).try_into().expect("16 bytes");
        let state = with_xmm0(get(&mut tool, 0), &value);
        assert_eq!(set(&mut tool, 0, &state), Ok(()));
        let read = get(&mut tool, 0);
        assert_eq!(read[XMM0..XMM0 + 16], value);
        assert_eq!(read[..XSTATE_BV], state[..XSTATE_BV]);
    }
    let state = get(&mut tool, 0);
    vcpu.stop();
    expect_that_of_kvm(&mut vcpu, &state);
}

fn guest_sees_what_was_set(_: &Ctx) {
    let vm = TestVm::running(Guest::StoreXmm, 1);
    let mut tool = vm.hook_allowing_all();
    for value in [[0x11; 16], *b"0123456789abcdef", [0xff; 16]] {
        let state = with_xmm0(get(&mut tool, 0), &value);
        assert_eq!(set(&mut tool, 0, &state), Ok(()));
        wait_for("the guest stores its new XMM0", || {
            vm.memory.read(xmm_value(0), 16) == value
        });
        vm.expect_progress();
        assert_eq!(vm.memory.read(xmm_value(0), 16), value, "it did not last");
    }
}

fn set_takes_effect_during_an_event(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::StoreXmm);
    let mut tool = vm.hook_allowing_all();
    vcpu.run();
    let paused = tool.pause(0);
    let state = with_xmm0(get(&mut tool, 0), &[0x77; 16]);
    assert_eq!(set(&mut tool, 0, &state), Ok(()));
    assert_eq!(get(&mut tool, 0)[XMM0..XMM0 + 16], [0x77; 16]);
    vcpu.interrupt();
    assert_eq!(of_kvm(&mut vcpu)[XMM0..XMM0 + 16], [0x77; 16]);
    vcpu.run();
    tool.resume(&paused);
    wait_for("the guest stores its new XMM0", || {
        vm.memory.read(xmm_value(0), 16) == [0x77; 16]
    });
}

fn state_that_kvm_refuses_is_invalid(_: &Ctx) {
    let vm = TestVm::running(Guest::StoreXmm, 1);
    let mut tool = vm.hook_allowing_all();
    let good = with_xmm0(get(&mut tool, 0), &[0x33; 16]);
    assert_eq!(set(&mut tool, 0, &good), Ok(()));
    let before = get(&mut tool, 0);

    let mut bad_mxcsr = with_xmm0(good.clone(), &[0x44; 16]);
    bad_mxcsr[MXCSR..MXCSR + 4].fill(0xff);
    assert_eq!(set(&mut tool, 0, &bad_mxcsr), Err(KvmiError::Inval));
    // Hosts without XSAVE do not look at the header.
    if before[XSTATE_BV..XSTATE_BV + 8] != [0; 8] {
        let mut bad_component = with_xmm0(good, &[0x44; 16]);
        bad_component[XSTATE_BV + 7] = 0x40;
        assert_eq!(set(&mut tool, 0, &bad_component), Err(KvmiError::Inval));
    } else {
        note!("no XSAVE here");
    }
    assert!(get(&mut tool, 0) == before, "a refused state has been set");
    vm.expect_progress();
}

fn state_must_be_complete(_: &Ctx) {
    let vm = TestVm::running(Guest::StoreXmm, 1);
    let mut tool = vm.hook_allowing_all();
    let state = with_xmm0(get(&mut tool, 0), &[0x33; 16]);
    for len in [0, 1, 512, 576, XSAVE_SIZE - 1] {
        let reply = set(&mut tool, 0, &state[..len]);
        assert_eq!(reply, Err(KvmiError::Inval), "{len} bytes");
    }
    assert_ne!(get(&mut tool, 0)[XMM0..XMM0 + 16], [0x33; 16]);
    let mut surplus = state;
    surplus.extend([0xff; 600]);
    assert_eq!(set(&mut tool, 0, &surplus), Ok(()));
    assert_eq!(get(&mut tool, 0)[XMM0..XMM0 + 16], [0x33; 16]);
    let reply = tool.call_vcpu(0, Command::VcpuGetXsave, &[0xff; 600]);
    assert!(reply.is_ok());
}

fn vcpus_have_states_of_their_own(_: &Ctx) {
    let vm = TestVm::running(Guest::StoreXmm, 2);
    let mut tool = vm.hook_allowing_all();
    for vcpu in [0, 1] {
        let value = [0x60 + vcpu as u8; 16];
        let state = with_xmm0(get(&mut tool, vcpu), &value);
        assert_eq!(set(&mut tool, vcpu, &state), Ok(()));
    }
    for vcpu in [0, 1] {
        let value = [0x60 + vcpu as u8; 16];
        assert_eq!(get(&mut tool, vcpu)[XMM0..XMM0 + 16], value);
        wait_for("the guest stores its XMM0", || {
            vm.memory.read(xmm_value(vcpu.into()), 16) == value
        });
    }
}
