// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The end of a session in the middle of each kind of guest event: the guest goes on as it wants,
//! and the next tool is told nothing that it has not asked for.

use iced_x86::code_asm::*;
use kvmi_abi::{guest_event::Cr, Event};

use crate::{
    access_tool::emit,
    event_breakpoint,
    event_code::{add_vcpu, load, write_cr, write_msr, write_xcr, DATA},
    event_common::Wish,
    event_hypercall::call,
    event_xsetbv,
    guest::{Mode, LOW, STOP},
    harness::{note, test, Ctx, Test},
    registers::LSTAR,
    role::Vmm,
    sys,
    tool::Tool,
    util::{promptly, Rng},
    vcpu::{Exit, Vcpu},
    vcpu_tool::Paused,
    vm::TestVm,
};

const AREA: &str = "event_end";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(session_may_end_during_a_write_of_a_control_register).long(),
    test!(session_may_end_during_a_write_of_an_msr).long(),
    test!(session_may_end_during_xsetbv).long(),
    test!(session_may_end_during_an_access_to_a_descriptor_table).long(),
    test!(session_may_end_during_a_call).long(),
    test!(session_may_end_during_a_breakpoint).long(),
    test!(session_may_end_during_a_step).long(),
    test!(vmm_may_be_killed_during_any_event)
        .long()
        .destructive(),
];

/// What a vCPU does again and again, and the tool is told.
struct Kind {
    wish: Wish,
    /// It makes two events.
    code: fn(&mut CodeAssembler, extensions: u64),
}

const CR4: Kind = Kind {
    wish: Wish::Cr(Cr::Cr4),
    code: |code, extensions| {
        write_cr(code, Cr::Cr4, extensions ^ 1 << 2);
        write_cr(code, Cr::Cr4, extensions);
    },
};
const SYSENTER: Kind = Kind {
    wish: Wish::Msr(0x175),
    code: |code, _| {
        write_msr(code, 0x175, 0x1000);
        write_msr(code, 0x175, 0x2000);
    },
};
const SYSCALL: Kind = Kind {
    wish: Wish::Msr(LSTAR),
    code: |code, _| {
        write_msr(code, LSTAR, 0x1000);
        write_msr(code, LSTAR, 0x2000);
    },
};
const XCR0: Kind = Kind {
    wish: Wish::Event(Event::Xsetbv),
    code: |code, _| {
        write_xcr(code, 0, 3);
        write_xcr(code, 0, 1);
    },
};
const TABLES: Kind = Kind {
    wish: Wish::Event(Event::Descriptor),
    code: |code, _| {
        emit(code.sgdt(ptr(DATA)));
        emit(code.lgdt(ptr(DATA)));
    },
};
const CALL: Kind = Kind {
    wish: Wish::Event(Event::Hypercall),
    code: |code, _| {
        emit(code.mov(r8, rdi));
        call(code);
        call(code);
        emit(code.mov(rdi, r8));
    },
};
const BREAKPOINT: Kind = Kind {
    wish: Wish::Event(Event::Breakpoint),
    code: |code, _| {
        emit(code.int3());
        emit(code.int3());
    },
};
const STEPS: Kind = Kind {
    wish: Wish::Step,
    code: |code, _| {
        // What a step needs special care for.
        emit(code.pushfq());
        emit(code.popfq());
        emit(code.int(9));
    },
};

/// A VM with a vCPU that does this until [`STOP`] is set, and counts.
fn busy(kind: &Kind) -> (TestVm, Vcpu) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    // OSXSAVE, which XSETBV needs.
    let extensions = vcpu.sregs().cr4 | 1 << 18;
    let set = vcpu.with(move |fd| {
        let mut sregs = fd.get_sregs()?;
        sregs.cr4 = extensions;
        fd.set_sregs(&sregs)
    });
    set.expect("KVM_SET_SREGS");
    load(&vm, &mut vcpu, Mode::Long, |code| {
        endless(code, kind, extensions)
    });
    (vm, vcpu)
}

fn endless(code: &mut CodeAssembler, kind: &Kind, extensions: u64) {
    let mut again = code.create_label();
    emit(code.set_label(&mut again));
    (kind.code)(code, extensions);
    emit(if code.bitness() == 64 {
        code.inc(dword_ptr(rbx))
    } else {
        code.inc(dword_ptr(bx))
    });
    emit(code.cmp(byte_ptr(STOP), 0));
    emit(code.je(again));
}

/// Lets some events pass; returns with one outstanding.
#[track_caller]
fn some_events(tool: &mut Tool, rng: &mut Rng) -> Paused {
    let mut event = Paused::from(&tool.next());
    for _ in 0..rng.below(4) {
        tool.resume(&event);
        event = Paused::from(&tool.next());
    }
    event
}

#[track_caller]
fn end_sessions(ctx: &Ctx, kind: &Kind) {
    let (vm, mut vcpu) = busy(kind);
    vcpu.run_through();
    vm.expect_progress_of(0);
    let mut rng = ctx.rng();
    for round in 0..ctx.rounds(200) {
        let mut tool = vm.hook_allowing_all();
        if round % 10 == 0 {
            // Nothing is left over that would tell this one.
            vm.expect_progress_of(0);
            tool.settle();
        }
        tool.wish(0, &[kind.wish], true);
        let event = some_events(&mut tool, &mut rng);
        if rng.one_in(3) {
            // When the guest may be about to do it, or the next thing.
            tool.resume(&event);
        }
        if rng.one_in(3) {
            vcpu.signal();
        }
        if rng.one_in(2) {
            vm.unhook();
        } else {
            let _vmm_end = tool.disconnect();
            if rng.one_in(2) {
                vm.expect_progress_of(0);
            }
            vm.unhook();
        }
        if rng.one_in(2) {
            vm.expect_progress_of(0);
        }
    }
    vm.memory.write(STOP, &[1]);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    // Of exceptions, those of its own alone.
    let vector = vm.record(0).vector;
    assert!([0, 3, 9].contains(&vector), "vector {vector}");
    assert_eq!(vcpu.regs().rflags & 0x100, 0, "TF is seen");
}

fn session_may_end_during_a_write_of_a_control_register(ctx: &Ctx) {
    end_sessions(ctx, &CR4);
}

fn session_may_end_during_a_write_of_an_msr(ctx: &Ctx) {
    end_sessions(ctx, &SYSCALL);
}

fn session_may_end_during_xsetbv(ctx: &Ctx) {
    event_xsetbv::need_interception();
    end_sessions(ctx, &XCR0);
}

fn session_may_end_during_an_access_to_a_descriptor_table(ctx: &Ctx) {
    end_sessions(ctx, &TABLES);
}

fn session_may_end_during_a_call(ctx: &Ctx) {
    end_sessions(ctx, &CALL);
}

fn session_may_end_during_a_breakpoint(ctx: &Ctx) {
    event_breakpoint::need_interception();
    end_sessions(ctx, &BREAKPOINT);
}

fn session_may_end_during_a_step(ctx: &Ctx) {
    end_sessions(ctx, &STEPS);
}

/// Has a vCPU that counts in real mode do something else in its loop.
#[track_caller]
fn divert(tool: &mut Tool, kind: &Kind) {
    let event = tool.pause(0);
    let extensions = event.arch.sregs.cr4;
    let mut code = CodeAssembler::new(16).expect("16-bit code");
    endless(&mut code, kind, extensions);
    let bytes = code.assemble(LOW).expect("code that can be encoded");
    assert_eq!(tool.write(LOW, &bytes), Ok(()));
    let mut regs = event.arch.regs;
    regs.rip = LOW;
    assert_eq!(tool.set_regs(0, &regs), Ok(()));
    tool.resume(&event);
}

fn vmm_may_be_killed_during_any_event(ctx: &Ctx) {
    event_breakpoint::need_interception();
    let steps = Kind {
        wish: Wish::Step,
        code: |code, _| {
            emit(code.pushf());
            emit(code.popf());
        },
    };
    let kinds = [CR4, SYSENTER, TABLES, BREAKPOINT, steps];
    let mut rng = ctx.rng();
    for _ in 0..ctx.rounds(20) {
        for kind in &kinds {
            note!("{:?}", kind.wish);
            let mut vmm = Vmm::start(1, 0);
            let (dev, mut tool) = (sys::open_dev(), Tool::new());
            let attached = sys::attach(&dev, vmm.vm_fd(), tool.vmm_fd());
            attached.expect("the VM can be attached");
            sys::allow_all(&dev);
            // From here on, the VM ends with its process.
            vmm.vm = None;
            divert(&mut tool, kind);
            tool.wish(0, &[kind.wish], true);
            let event = some_events(&mut tool, &mut rng);
            if rng.one_in(3) {
                tool.resume(&event);
            }
            promptly("the end of the VMM", || vmm.process.kill());
            tool.drain();
            promptly("close", || drop(dev));
        }
    }
    TestVm::counting(1).expect_usable();
}
