// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Replies to CR events, and other ways to end them.

use iced_x86::code_asm::*;
use kvmi_abi::{guest_event::Cr, id::VCPU_EVENT, ioctl::EventTimeout, Action, Event};
use zerocopy::IntoBytes as _;

use crate::{
    access_tool::emit,
    event_code::{add_vcpu, is_tcg, load, write_cr},
    event_common::{expect_crash, expect_refused, Doing, Wish},
    event_cr::{about_to_write, for_each, read, values, DE, OTHER_TABLES, TS},
    guest::{Mode, PML4},
    harness::{note, test, Ctx, Test},
    sys,
    tool::message,
    vcpu::Exit,
    vcpu_tool::exception,
    vm::{TestVm, PAGE},
};

const AREA: &str = "event_cr_reply";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(value_of_the_tool_is_written_in_each_mode),
    test!(write_can_be_blocked),
    test!(impossible_value_of_the_tool_ends_the_connection),
    test!(reply_must_have_its_size),
    test!(retry_is_refused),
    test!(crash_ends_kvm_run),
    test!(registers_can_be_set_in_an_event),
    test!(registers_set_elsewhere_skip_the_write),
    test!(late_reply_is_none),
    test!(exception_injected_in_an_event_comes_first),
    test!(next_tool_is_told_nothing),
];

fn value_of_the_tool_is_written_in_each_mode(_: &Ctx) {
    for_each(|mode, cr| {
        let mut vm = TestVm::new();
        let mut vcpu = add_vcpu(&mut vm, mode);
        let (old, new) = values(&vm, &mut vcpu, cr);
        let value = match cr {
            Cr::Cr0 => new ^ TS,
            Cr::Cr3 => OTHER_TABLES + PAGE as u64,
            Cr::Cr4 => new ^ DE,
        };
        vm.memory.write(
            OTHER_TABLES + PAGE as u64,
            &vm.memory.read(OTHER_TABLES, PAGE),
        );
        load(&vm, &mut vcpu, mode, |code| {
            write_cr(code, cr, new);
            // The guest reads what there is, not what it has written.
            emit(match (cr, code.bitness()) {
                (Cr::Cr0, 64) => code.mov(rcx, cr0),
                (Cr::Cr3, 64) => code.mov(rcx, cr3),
                (Cr::Cr4, 64) => code.mov(rcx, cr4),
                (Cr::Cr0, _) => code.mov(ecx, cr0),
                (Cr::Cr3, _) => code.mov(ecx, cr3),
                (Cr::Cr4, _) => code.mov(ecx, cr4),
            });
        });
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Cr(cr)]);
        let event = tool.expect(0, Doing::Cr { cr, old, new });
        tool.replace(&event, value);
        tool.expect_end(&mut vcpu);
        assert_eq!(read(&mut vcpu, cr), value);
        assert_eq!(vcpu.regs().rcx, value);
    });
}

fn write_can_be_blocked(_: &Ctx) {
    for_each(|mode, cr| {
        if (mode, cr) == (Mode::Pae32, Cr::Cr3) && is_tcg() {
            // QEMU's CPU has set a bit in the tables that is reserved there.
            return;
        }
        let (vm, mut vcpu, doing) = about_to_write(mode, cr);
        let old = read(&mut vcpu, cr);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Cr(cr)]);
        let event = tool.expect(0, doing);
        tool.replace(&event, old);
        tool.expect_end(&mut vcpu);
        assert_eq!(read(&mut vcpu, cr), old);
    });
}

fn impossible_value_of_the_tool_ends_the_connection(_: &Ctx) {
    for (cr, value) in [
        (Cr::Cr0, 1 << 31),
        (Cr::Cr0, u64::MAX),
        (Cr::Cr3, 1 << 62),
        (Cr::Cr3, u64::MAX),
        (Cr::Cr4, 1 << 31),
        (Cr::Cr4, u64::MAX),
        // Long mode needs PAE.
        (Cr::Cr4, 0),
    ] {
        note!("{cr:?} {value:#x}");
        let (vm, mut vcpu, doing) = about_to_write(Mode::Long, cr);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Cr(cr)]);
        let event = tool.expect(0, doing);
        tool.replace(&event, value);
        tool.expect_closed();
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        assert_eq!(Some(read(&mut vcpu, cr)), doing.new_value());
        assert_eq!(vm.record(0).count, 0, "the guest got an exception");
        vm.unhook();
        vm.hook_allowing_all();
    }
}

fn reply_must_have_its_size(_: &Ctx) {
    for size in [0, 1, 7, 9, 16] {
        let (vm, mut vcpu, doing) = about_to_write(Mode::Long, Cr::Cr4);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Cr(Cr::Cr4)]);
        let event = tool.expect(0, doing);
        let mut reply = event.reply(Action::Continue.code()).as_bytes().to_vec();
        reply.extend(vec![0; size]);
        tool.send_raw(&message(VCPU_EVENT, event.seq, &reply));
        tool.expect_closed();
        assert_eq!(vcpu.exit(), Exit::Out(0x10), "{size} bytes");
        assert_eq!(Some(read(&mut vcpu, Cr::Cr4)), doing.new_value());
    }
}

fn retry_is_refused(_: &Ctx) {
    let (vm, mut vcpu, doing) = about_to_write(Mode::Long, Cr::Cr3);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[Wish::Cr(Cr::Cr3)]);
    let event = tool.expect(0, doing);
    expect_refused(tool, &mut vcpu, &event, Action::Retry);
    assert_eq!(Some(read(&mut vcpu, Cr::Cr3)), doing.new_value());
}

fn crash_ends_kvm_run(_: &Ctx) {
    for cr in Cr::ALL {
        let (vm, mut vcpu, doing) = about_to_write(Mode::Long, cr);
        let old = read(&mut vcpu, cr);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &[Wish::Cr(cr)]);
        let event = tool.expect(0, doing);
        expect_crash(&mut tool, &mut vcpu, &event);
        assert_eq!(read(&mut vcpu, cr), old);
    }
}

fn registers_can_be_set_in_an_event(_: &Ctx) {
    let (vm, mut vcpu, doing) = about_to_write(Mode::Long, Cr::Cr3);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[Wish::Cr(Cr::Cr3)]);
    let event = tool.expect(0, doing);
    let mut regs = event.arch.regs;
    regs.r15 = 15;
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    tool.resume(&event);
    tool.expect_end(&mut vcpu);
    assert_eq!(vcpu.regs().r15, 15);
    assert_eq!(Some(read(&mut vcpu, Cr::Cr3)), doing.new_value());
}

fn registers_set_elsewhere_skip_the_write(_: &Ctx) {
    let (vm, mut vcpu, doing) = about_to_write(Mode::Long, Cr::Cr3);
    let old = read(&mut vcpu, Cr::Cr3);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[Wish::Cr(Cr::Cr3)]);
    let event = tool.expect(0, doing);
    let mut regs = event.arch.regs;
    // mov %rax, %cr3
    regs.rip += 3;
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    tool.resume(&event);
    tool.expect_end(&mut vcpu);
    assert_eq!(read(&mut vcpu, Cr::Cr3), old);
}

fn late_reply_is_none(_: &Ctx) {
    let (vm, mut vcpu, doing) = about_to_write(Mode::Long, Cr::Cr4);
    let mut tool = vm.hook_allowing_all();
    let limit = EventTimeout {
        ms: 300,
        padding: 0,
    };
    assert_eq!(sys::vm_event_timeout(&vm, limit), Ok(()));
    tool.run_telling(&mut vcpu, &[Wish::Cr(Cr::Cr4)]);
    tool.expect(0, doing);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    assert_eq!(Some(read(&mut vcpu, Cr::Cr4)), doing.new_value());
    tool.expect_closed();
}

fn exception_injected_in_an_event_comes_first(_: &Ctx) {
    const UD: u8 = 6;
    let (vm, mut vcpu, doing) = about_to_write(Mode::Long, Cr::Cr4);
    let mut tool = vm.hook_allowing_all();
    tool.run_telling(&mut vcpu, &[Wish::Cr(Cr::Cr4)]);
    let event = tool.expect(0, doing);
    let rip = event.arch.regs.rip;
    assert_eq!(tool.inject(0, exception(UD, 0, 0)), Ok(()));
    tool.resume(&event);
    let trap = tool.vcpu_event(0, Event::Trap);
    tool.resume(&trap);
    // Its handler returns to the write, which the tool is asked about again.
    let again = tool.expect(0, doing);
    let record = vm.record(0);
    assert_eq!(
        (record.vector, record.count, record.rip),
        (UD.into(), 1, rip)
    );
    tool.resume(&again);
    tool.expect_end(&mut vcpu);
    assert_eq!(Some(read(&mut vcpu, Cr::Cr4)), doing.new_value());
    assert_eq!(vm.record(0).count, 1);
}

fn next_tool_is_told_nothing(_: &Ctx) {
    for unhook in [true, false] {
        let (vm, mut vcpu, doing) = about_to_write(Mode::Long, Cr::Cr3);
        let mut tool = vm.hook_allowing_all();
        tool.run_telling(&mut vcpu, &Cr::ALL.map(Wish::Cr));
        tool.expect(0, doing);
        // In the middle of the event.
        if unhook {
            vm.unhook();
        } else {
            drop(tool.disconnect());
        }
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        assert_eq!(Some(read(&mut vcpu, Cr::Cr3)), doing.new_value());
        if !unhook {
            vm.unhook();
        }
        let mut next = vm.hook_allowing_all();
        let (old, new) = (read(&mut vcpu, Cr::Cr3), PML4);
        assert_ne!(old, new);
        load(&vm, &mut vcpu, Mode::Long, |code| {
            write_cr(code, Cr::Cr3, new)
        });
        // Both halves are gone, the choice of the register, too.
        next.expect_events(&mut vcpu, &[Wish::Event(Event::Cr)], &[]);
        assert_eq!(read(&mut vcpu, Cr::Cr3), new);
    }
}
