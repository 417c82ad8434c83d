// SPDX-License-Identifier: GPL-2.0 OR MIT

//! DESCRIPTOR events: the guest loads or stores GDTR, IDTR, LDTR or TR.

use iced_x86::code_asm::*;
use kvmi_abi::{
    guest_event::{
        Cr,
        DescriptorRegister::{self, Gdtr, Idtr, Ldtr, Tr},
    },
    Action, Command, Event, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    access_tool::emit,
    event_code::{
        add_vcpu, attempt, faults, has_umip, load, load_user, set_handler, survive, write_cr, CODE,
        DATA, USER_GPA,
    },
    event_common::{control_event, expect_crash, Doing, Wish},
    guest::Mode,
    harness::{note, skip, test, Ctx, Test},
    sys,
    tool::Tool,
    vcpu::{Exit, Vcpu},
    vm::{TestVm, SCRATCH},
};

const AREA: &str = "event_descriptor";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(event_can_be_switched_on_and_off),
    test!(each_access_is_told_and_done_in_each_mode),
    test!(retry_asks_again),
    test!(registers_set_elsewhere_skip_the_access),
    test!(crash_ends_kvm_run),
    test!(accesses_of_user_space_are_told),
    test!(prevented_instructions_stay_prevented),
    test!(stores_to_memory_have_two_bytes),
    test!(task_of_16_bits_faults_in_long_mode),
    test!(accesses_of_the_vmm_make_no_event),
    test!(next_tool_is_told_nothing),
];

const WISH: Wish = Wish::Event(Event::Descriptor);
/// Where segment descriptors are, and where they are after LGDT.
const TABLES: u64 = SCRATCH;
const OTHER_TABLES: u64 = SCRATCH + 0x100;
/// What LGDT and LIDT load.
const GDT_POINTER: u64 = DATA + 0x80;
const IDT_POINTER: u64 = DATA + 0x90;
/// Selectors of a local descriptor table and of a task.
const LDT: u32 = 0x28;
const TSS: u32 = 0x38;
const LIMIT: u16 = 0x47;

fn has_system_segments(mode: Mode) -> bool {
    mode != Mode::Real
}

/// Writes tables; each begins with what the guests have.
fn write_tables(vm: &TestVm, vcpu: &mut Vcpu) {
    let sregs = vcpu.sregs();
    let own = vm
        .memory
        .read(sregs.gdt.base, usize::from(sregs.gdt.limit).min(39) + 1);
    for at in [TABLES, OTHER_TABLES] {
        vm.memory.write(at, &own);
        // Present; the base is DATA.
        let ldt = 0x0000_8200_0000_0007 | DATA << 16;
        let tss = 0x0000_8900_0000_0067 | DATA << 16;
        vm.memory.write(at + u64::from(LDT), &u64::to_le_bytes(ldt));
        vm.memory.write(at + u64::from(TSS), &u64::to_le_bytes(tss));
    }
    let pointer = |at, base: u64, limit: u16| {
        vm.memory.write(at, &limit.to_le_bytes());
        vm.memory.write(at + 2, &base.to_le_bytes());
    };
    pointer(GDT_POINTER, OTHER_TABLES, LIMIT);
    // All vectors of exceptions are still there.
    pointer(IDT_POINTER, sregs.idt.base, sregs.idt.limit & 0x1ff);
    let set = vcpu.with(move |fd| {
        let mut sregs = fd.get_sregs()?;
        sregs.gdt.base = TABLES;
        sregs.gdt.limit = 0x4f;
        fd.set_sregs(&sregs)
    });
    set.expect("KVM_SET_SREGS");
}

fn access(register: DescriptorRegister, load: bool) -> Doing {
    Doing::Descriptor { register, load }
}

/// Every access that there is in a mode.
fn write_all(code: &mut CodeAssembler, mode: Mode) -> Vec<Doing> {
    let mut all = vec![access(Gdtr, false), access(Idtr, false)];
    emit(code.sgdt(ptr(DATA)));
    emit(code.sidt(ptr(DATA + 16)));
    if has_system_segments(mode) {
        emit(code.sldt(ax));
        emit(code.mov(word_ptr(DATA + 32), ax));
        emit(code.sldt(word_ptr(DATA + 34)));
        emit(code.str(eax));
        emit(code.mov(dword_ptr(DATA + 36), eax));
        emit(code.str(word_ptr(DATA + 40)));
        all.extend([access(Ldtr, false); 2]);
        all.extend([access(Tr, false); 2]);
    }
    emit(code.lgdt(ptr(GDT_POINTER)));
    emit(code.lidt(ptr(IDT_POINTER)));
    all.extend([access(Gdtr, true), access(Idtr, true)]);
    if has_system_segments(mode) {
        emit(code.mov(eax, LDT));
        emit(code.lldt(ax));
        emit(code.mov(dword_ptr(DATA + 44), TSS));
        emit(code.ltr(word_ptr(DATA + 44)));
        all.extend([access(Ldtr, true), access(Tr, true)]);
    }
    emit(code.sgdt(ptr(DATA + 48)));
    emit(code.sidt(ptr(DATA + 64)));
    all.extend([access(Gdtr, false), access(Idtr, false)]);
    all
}

/// A VM with one vCPU that makes all accesses; returns what is told of them, too.
fn about_to_access(mode: Mode) -> (TestVm, Vcpu, Vec<Doing>) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, mode);
    write_tables(&vm, &mut vcpu);
    let mut all = vec![];
    load(&vm, &mut vcpu, mode, |code| all = write_all(code, mode));
    (vm, vcpu, all)
}

/// Switches the event on for a vCPU that is about to run, if the CPU can tell.
#[track_caller]
fn run_telling(tool: &mut Tool, vcpu: &mut Vcpu) {
    let sent = tool.send_wishes(vcpu.index, &[WISH]);
    tool.settle();
    vcpu.run();
    for (command, seq) in sent {
        match tool.reply_to(command.id(), seq) {
            Err(KvmiError::OpNotSupp) => skip("the CPU cannot tell"),
            reply => assert_eq!(reply, Ok(vec![])),
        }
    }
}

fn event_can_be_switched_on_and_off(_: &Ctx) {
    let vm = TestVm::counting(1);
    let mut tool = vm.hook_allowing_all();
    let id = Event::Descriptor.id();
    if tool.control_vcpu_event(0, id, 1) == Err(KvmiError::OpNotSupp) {
        assert_eq!(tool.control_vcpu_event(0, id, 0), Ok(()));
        skip("the CPU cannot tell");
    }
    for enable in [1, 1, 0, 0, 1] {
        assert_eq!(tool.control_vcpu_event(0, id, enable), Ok(()));
    }
    sys::event(&vm, 0, id.into()).expect("an event can be disallowed");
    assert_eq!(tool.control_vcpu_event(0, id, 1), Err(KvmiError::Perm));
    vm.expect_progress();
}

fn each_access_is_told_and_done_in_each_mode(_: &Ctx) {
    for (mode, _) in Mode::ALL {
        note!("{mode:?}");
        let result = |vm: &TestVm, vcpu: &mut Vcpu| {
            let sregs = vcpu.sregs();
            let memory = [DATA, TABLES].map(|at| vm.memory.read(at, 0x200));
            let tables = (sregs.gdt, sregs.idt, sregs.ldt, sregs.tr);
            (format!("{tables:x?} {:x?}", vcpu.regs()), memory)
        };
        let (vm, mut vcpu, _) = about_to_access(mode);
        assert_eq!(vcpu.run_until_exit(), Exit::Out(0x10));
        let free = result(&vm, &mut vcpu);

        let (vm, mut vcpu, all) = about_to_access(mode);
        let mut tool = vm.hook_allowing_all();
        run_telling(&mut tool, &mut vcpu);
        tool.let_pass(0, &all);
        tool.expect_end(&mut vcpu);
        assert_eq!(result(&vm, &mut vcpu), free);
        assert_eq!(vcpu.sregs().gdt.base, OTHER_TABLES);
    }
}

fn retry_asks_again(_: &Ctx) {
    for mode in [Mode::Long, Mode::Protected32, Mode::Real] {
        let (vm, mut vcpu, all) = about_to_access(mode);
        let mut tool = vm.hook_allowing_all();
        run_telling(&mut tool, &mut vcpu);
        for doing in all {
            let first = tool.expect(0, doing);
            tool.answer(&first, Action::Retry);
            let second = tool.expect(0, doing);
            assert_eq!(second.arch.regs.rip, first.arch.regs.rip);
            assert_eq!(second.seq, first.seq + 1);
            tool.resume(&second);
        }
        tool.expect_end(&mut vcpu);
    }
}

fn registers_set_elsewhere_skip_the_access(_: &Ctx) {
    for action in [Action::Continue, Action::Retry] {
        let (vm, mut vcpu, all) = about_to_access(Mode::Long);
        let mut tool = vm.hook_allowing_all();
        run_telling(&mut tool, &mut vcpu);
        let event = tool.expect(0, all[0]);
        let mut regs = event.arch.regs;
        // sgdt DATA
        regs.rip += 8;
        assert_eq!(tool.set_regs(0, &regs), Ok(()));
        tool.answer(&event, action);
        tool.let_pass(0, &all[1..]);
        tool.expect_end(&mut vcpu);
        assert_eq!(vm.memory.read(DATA, 10), [0; 10]);
    }
}

fn crash_ends_kvm_run(_: &Ctx) {
    let (vm, mut vcpu, all) = about_to_access(Mode::Long);
    let mut tool = vm.hook_allowing_all();
    run_telling(&mut tool, &mut vcpu);
    let event = tool.expect(0, all[0]);
    expect_crash(&mut tool, &mut vcpu, &event);
    assert_eq!(vm.memory.read(DATA, 10), [0; 10]);
}

fn accesses_of_user_space_are_told(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    let gdt = vcpu.sregs().gdt;
    load_user(&vm, &mut vcpu, |code| {
        let mut here = code.create_label();
        emit(code.set_label(&mut here));
        emit(code.lea(rbx, qword_ptr(here)));
        emit(code.sgdt(ptr(rbx + 0x100)));
        emit(code.sldt(ax));
    });
    let mut tool = vm.hook_allowing_all();
    run_telling(&mut tool, &mut vcpu);
    tool.let_pass(0, &[access(Gdtr, false), access(Ldtr, false)]);
    tool.expect_end(&mut vcpu);
    let stored = vm.memory.read(USER_GPA + 0x100, 10);
    assert_eq!(stored[..2], gdt.limit.to_le_bytes());
    assert_eq!(stored[2..], gdt.base.to_le_bytes());
}

fn prevented_instructions_stay_prevented(_: &Ctx) {
    const UMIP: u64 = 1 << 11;
    if !has_umip() {
        skip("the CPU has no UMIP");
    }
    // With the event, without it, and when it is off again.
    for wanted in [&[][..], &[true], &[true, false]] {
        let mut vm = TestVm::new();
        let mut vcpu = add_vcpu(&mut vm, Mode::Long);
        load_user(&vm, &mut vcpu, |code| {
            emit(code.mov(rbx, USER_DATA));
            emit(code.sidt(ptr(rbx)));
        });
        let handler = CODE + 0x700;
        let mut code = CodeAssembler::new(64).expect("64-bit code");
        emit(code.out(0x13, al));
        vm.memory
            .write(handler, &code.assemble(handler).expect("code"));
        set_handler(&vm, &mut vcpu, Mode::Long, 13, handler);
        let set = vcpu.with(|fd| {
            let mut sregs = fd.get_sregs()?;
            sregs.cr4 |= UMIP;
            // Where the stack of CPL 0 is: RSP0 is at 4.
            sregs.tr.base = SCRATCH + 0x800;
            fd.set_sregs(&sregs)
        });
        set.expect("KVM_SET_SREGS");
        vm.memory
            .write(SCRATCH + 0x804, &u64::to_le_bytes(SCRATCH + 0xc00));
        let mut tool = vm.hook_allowing_all();
        let seqs: Vec<_> = wanted
            .iter()
            .map(|on| {
                let request = control_event(Event::Descriptor, *on);
                tool.send_to(0, Command::VcpuControlEvents, request.as_bytes())
            })
            .collect();
        tool.settle();
        vcpu.run();
        for seq in seqs {
            let reply = tool.reply_to(Command::VcpuControlEvents.id(), seq);
            assert_eq!(reply, Ok(vec![]));
        }
        assert_eq!(vcpu.exit(), Exit::Out(0x13), "{wanted:?}");
        tool.settle();
    }
}

fn stores_to_memory_have_two_bytes(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    write_tables(&vm, &mut vcpu);
    load(&vm, &mut vcpu, Mode::Long, |code| {
        emit(code.mov(rbx, DATA));
        // sldt and str, with REX.W: there is no other way to say so.
        emit(code.db(&[0x48, 0x0f, 0x00, 0x03]));
        emit(code.db(&[0x48, 0x0f, 0x00, 0x4b, 0x08]));
    });
    vm.memory.write(DATA, &[0xff; 16]);
    let mut tool = vm.hook_allowing_all();
    run_telling(&mut tool, &mut vcpu);
    tool.let_pass(0, &[access(Ldtr, false), access(Tr, false)]);
    tool.expect_end(&mut vcpu);
    let sregs = vcpu.sregs();
    for (at, selector) in [(DATA, sregs.ldt.selector), (DATA + 8, sregs.tr.selector)] {
        let mut expected = [0xff; 8];
        expected[..2].copy_from_slice(&selector.to_le_bytes());
        assert_eq!(vm.memory.read(at, 8), expected);
    }
}

fn task_of_16_bits_faults_in_long_mode(_: &Ctx) {
    for mode in [Mode::Long, Mode::Compat32] {
        note!("{mode:?}");
        let mut vm = TestVm::new();
        let mut vcpu = add_vcpu(&mut vm, mode);
        write_tables(&vm, &mut vcpu);
        let tss = 0x0000_8100_0000_002b | DATA << 16;
        vm.memory
            .write(TABLES + u64::from(TSS), &u64::to_le_bytes(tss));
        survive(&vm, &mut vcpu, mode, 13);
        load(&vm, &mut vcpu, mode, |code| {
            emit(code.mov(eax, TSS));
            attempt(code, |code| emit(code.ltr(ax)));
        });
        let tr = vcpu.sregs().tr;
        let mut tool = vm.hook_allowing_all();
        run_telling(&mut tool, &mut vcpu);
        tool.let_pass(0, &[access(Tr, true)]);
        tool.expect_end(&mut vcpu);
        assert_eq!(faults(&vm), 1);
        assert_eq!(vcpu.sregs().tr, tr);
    }
}

/// Memory of user space behind its code.
const USER_DATA: u64 = crate::event_code::USER + 0x100;

fn accesses_of_the_vmm_make_no_event(_: &Ctx) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, Mode::Long);
    load(&vm, &mut vcpu, Mode::Long, |code| emit(code.out(0x11, al)));
    let mut tool = vm.hook_allowing_all();
    run_telling(&mut tool, &mut vcpu);
    assert_eq!(vcpu.exit(), Exit::Out(0x11));
    write_tables(&vm, &mut vcpu);
    vcpu.run();
    tool.expect_end(&mut vcpu);
    assert_eq!(vcpu.sregs().gdt.base, TABLES);
}

fn next_tool_is_told_nothing(_: &Ctx) {
    for unhook in [true, false] {
        let (vm, mut vcpu, all) = about_to_access(Mode::Long);
        let mut tool = vm.hook_allowing_all();
        run_telling(&mut tool, &mut vcpu);
        tool.expect(0, all[0]);
        // In the middle of the event.
        if unhook {
            vm.unhook();
        } else {
            drop(tool.disconnect());
        }
        assert_eq!(vcpu.exit(), Exit::Out(0x10));
        assert_eq!(vm.memory.read(DATA, 2), [0x4f, 0]);
        if !unhook {
            vm.unhook();
        }
        let mut next = vm.hook_allowing_all();
        load(&vm, &mut vcpu, Mode::Long, |code| {
            write_cr(code, Cr::Cr3, crate::guest::PML4);
            emit(code.sgdt(ptr(DATA)));
        });
        next.expect_events(&mut vcpu, &[], &[]);
    }
}
