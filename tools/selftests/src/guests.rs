// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The tests' own guests, without introspection: what other tests rely on.

use crate::{
    guest::{has_error_code, xmm_value, Mode, SPIN_CODE},
    harness::{test, Ctx, Test},
    util::wait_for,
    vcpu::Exit,
    vm::{Guest, TestVm, STOP},
};

const AREA: &str = "guests";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(guests_run_in_each_mode),
    test!(guests_count_and_stop),
    test!(handlers_see_exceptions_of_the_vmm),
];

fn guests_run_in_each_mode(_: &Ctx) {
    for (mode, _) in Mode::ALL {
        let mut vm = TestVm::new();
        let mut vcpu = vm.control(Guest::Spin(mode));
        let regs = vcpu.regs();
        vcpu.run();
        vcpu.stop();
        assert_eq!(vcpu.regs().rip, SPIN_CODE, "{mode:?}");
        assert_eq!(vcpu.regs().rsp, regs.rsp, "{mode:?}");
    }
}

fn guests_count_and_stop(_: &Ctx) {
    let mut vm = TestVm::running(Guest::StoreXmm, 1);
    vm.memory.fill(xmm_value(0), 16, 0xff);
    vm.expect_progress();
    vm.expect_progress();
    assert_eq!(vm.memory.read(xmm_value(0), 16), [0; 16]);
    for guest in [Guest::Count, Guest::Count64] {
        let mut vcpu = vm.control(guest);
        vcpu.run();
        vm.expect_progress_of(vcpu.index.into());
        vm.memory.write(STOP, &[1]);
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        vm.memory.write(STOP, &[0]);
    }
}

fn handlers_see_exceptions_of_the_vmm(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    for (count, nr) in (1..).zip([0, 6, 13, 14, 17]) {
        let error_code = if has_error_code(nr) { 2 } else { 0 };
        let set = vcpu.with(move |fd| {
            let mut events = fd.get_vcpu_events()?;
            events.exception.injected = 1;
            events.exception.nr = nr;
            events.exception.has_error_code = has_error_code(nr).into();
            events.exception.error_code = error_code;
            fd.set_vcpu_events(&events)
        });
        set.expect("KVM_SET_VCPU_EVENTS");
        vcpu.run();
        wait_for("the handler runs", || vm.record(0).count == count);
        vcpu.stop();
        let record = vm.record(0);
        assert_eq!((record.vector, record.rip), (nr.into(), SPIN_CODE));
        assert_eq!(record.error_code, error_code.into());
    }
}
