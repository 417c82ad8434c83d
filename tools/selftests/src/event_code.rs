// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Code of each mode for the tests of guest events, which survives exceptions if it is told to.

use iced_x86::{code_asm::*, BlockEncoderOptions};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use kvmi_abi::guest_event::Cr;

use crate::{
    access_tool::emit,
    guest::{has_error_code, Mode, HIGH, LOW, LOW_SIZE},
    registers::{EFER, LSTAR, STAR},
    vcpu::Vcpu,
    vm::{Guest, TestVm, PAGE, SCRATCH},
};

/// Where code is, in every mode.
pub const CODE: u64 = LOW;
/// Memory for data that code of every mode reaches.
pub const DATA: u64 = LOW + 0x900;
/// Where [`survive`] counts.
const FAULTS: u64 = LOW + 0x880;
/// Where the handlers of [`survive`] are.
const HANDLERS: u64 = LOW + 0x800;
const _: () = assert!(DATA < LOW + LOW_SIZE);

/// RIP of code in real mode at this address: there, its segment does not begin at 0.
fn offset(mode: Mode, address: u64) -> u64 {
    match mode {
        Mode::Real => address - REAL_BASE,
        _ => address,
    }
}

/// RIP at [`CODE`].
pub fn code_rip(mode: Mode) -> u64 {
    offset(mode, CODE)
}

const REAL_BASE: u64 = LOW & !0xfff;

/// How many bits code of a mode has.
fn bits(mode: Mode) -> u32 {
    let (_, size) = Mode::ALL
        .iter()
        .find(|(other, _)| *other == mode)
        .copied()
        .expect("a mode");
    u32::from(size) * 8
}

/// Adds a vCPU that is about to run what [`load`] writes.
pub fn add_vcpu(vm: &mut TestVm, mode: Mode) -> Vcpu {
    let mut vcpu = vm.control(Guest::Spin(mode));
    vcpu.with(move |fd| {
        if mode == Mode::Real {
            let cpuid = supported_cpuid();
            fd.set_cpuid2(&cpuid).expect("CPUID can be set");
            let mut sregs = fd.get_sregs().expect("KVM_GET_SREGS");
            sregs.cs.base = REAL_BASE;
            // Lossless: it is below 1 MiB.
            sregs.cs.selector = (REAL_BASE >> 4) as u16;
            fd.set_sregs(&sregs).expect("KVM_SET_SREGS");
        }
    });
    vcpu
}

fn supported_cpuid() -> kvm_bindings::CpuId {
    let kvm = Kvm::new().expect("/dev/kvm can be opened");
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    cpuid.expect("CPUID can be read")
}

/// Sets bits in ECX of a guest's CPUID leaf 1.
pub fn add_features_ecx(vcpu: &mut Vcpu, bits: u32) {
    vcpu.with(move |fd| {
        let mut cpuid = supported_cpuid();
        let mut leaves = cpuid.as_mut_slice().iter_mut();
        let leaf = leaves.find(|leaf| leaf.function == 1).expect("leaf 1");
        leaf.ecx |= bits;
        fd.set_cpuid2(&cpuid).expect("CPUID can be set");
    });
}

/// ECX of the guests' CPUID leaf 1.
pub fn features_ecx() -> u32 {
    let cpuid = supported_cpuid();
    let leaf = cpuid.as_slice().iter().find(|leaf| leaf.function == 1);
    leaf.map_or(0, |leaf| leaf.ecx)
}

/// Whether the guests' CPUID has UMIP.
pub fn has_umip() -> bool {
    let cpuid = supported_cpuid();
    let mut leaves = cpuid.as_slice().iter();
    leaves.any(|leaf| leaf.function == 7 && leaf.index == 0 && leaf.ecx & 1 << 2 != 0)
}

/// Whether the host runs on the CPU that QEMU emulates.
pub fn is_tcg() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    let name = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes);
    name.concat() == b"TCGTCGTCGTCG"
}

/// Whether the host's CPU is AMD's.
pub fn is_amd() -> bool {
    std::arch::x86_64::__cpuid(0).ecx.to_le_bytes() == *b"cAMD"
}

/// Writes code, with a way out to the VMM at its end, and has the vCPU begin there. Returns the RIPs
/// of its instructions; the last one is that of the way out.
pub fn load(
    vm: &TestVm,
    vcpu: &mut Vcpu,
    mode: Mode,
    write: impl FnOnce(&mut CodeAssembler),
) -> Vec<u64> {
    let address = CODE + 256 * u64::from(vcpu.index);
    let rip = offset(mode, address);
    let mut code = CodeAssembler::new(bits(mode)).expect("a mode of x86");
    write(&mut code);
    emit(code.out(0x10, al));
    let encoded = code.assemble_options(rip, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS);
    let encoded = encoded.expect("code that can be encoded").inner;
    let end = address + encoded.code_buffer.len() as u64;
    assert!(end <= HANDLERS, "too much code");
    vm.memory.write(address, &encoded.code_buffer);
    vcpu.change_regs(|regs| regs.rip = rip);
    let offsets = encoded.new_instruction_offsets.iter();
    offsets.map(|offset| rip + u64::from(*offset)).collect()
}

/// A VM with one vCPU that is about to run this code.
pub fn code_in(mode: Mode, write: impl FnOnce(&mut CodeAssembler)) -> (TestVm, Vcpu) {
    let mut vm = TestVm::new();
    let mut vcpu = add_vcpu(&mut vm, mode);
    load(&vm, &mut vcpu, mode, write);
    (vm, vcpu)
}

/// Changes RAX.
pub fn write_cr(code: &mut CodeAssembler, cr: Cr, value: u64) {
    if code.bitness() == 64 {
        emit(code.mov(rax, value));
        emit(match cr {
            Cr::Cr0 => code.mov(cr0, rax),
            Cr::Cr3 => code.mov(cr3, rax),
            Cr::Cr4 => code.mov(cr4, rax),
        });
    } else {
        emit(code.mov(eax, u32::try_from(value).expect("32 bits")));
        emit(match cr {
            Cr::Cr0 => code.mov(cr0, eax),
            Cr::Cr3 => code.mov(cr3, eax),
            Cr::Cr4 => code.mov(cr4, eax),
        });
    }
}

/// EDX:EAX
fn halves(code: &mut CodeAssembler, value: u64) {
    emit(code.mov(eax, value as u32));
    emit(code.mov(edx, (value >> 32) as u32));
}

/// Changes RAX, RCX and RDX.
pub fn write_msr(code: &mut CodeAssembler, msr: u32, value: u64) {
    emit(code.mov(ecx, msr));
    halves(code, value);
    emit(code.wrmsr());
}

/// Changes RAX, RCX and RDX.
pub fn write_xcr(code: &mut CodeAssembler, xcr: u32, value: u64) {
    emit(code.mov(ecx, xcr));
    halves(code, value);
    emit(code.xsetbv());
}

/// Has an exception end [`attempt`], and counted.
pub fn survive(vm: &TestVm, vcpu: &mut Vcpu, mode: Mode, vector: u8) {
    // Those of long mode are 64-bit code, those of protected mode 32-bit code.
    let bits = match mode {
        Mode::Real => 16,
        Mode::Long | Mode::Compat16 | Mode::Compat32 => 64,
        _ => 32,
    };
    let has_error_code = has_error_code(vector);
    let mut code = CodeAssembler::new(bits).expect("a mode of x86");
    emit(code.inc(dword_ptr(FAULTS)));
    match bits {
        64 => {
            emit(code.lea(rsp, qword_ptr(rsp + 8 * i32::from(has_error_code))));
            emit(code.mov(qword_ptr(rsp), rbp));
            emit(code.iretq());
        }
        32 => {
            emit(code.lea(esp, dword_ptr(esp + 4 * i32::from(has_error_code))));
            emit(code.mov(dword_ptr(esp), ebp));
            emit(code.iretd());
        }
        _ => {
            emit(code.mov(bx, sp));
            emit(code.mov(word_ptr(bx), bp));
            emit(code.iret());
        }
    }
    let handler = HANDLERS + 32 * u64::from(has_error_code);
    let bytes = code.assemble(handler).expect("code that can be encoded");
    vm.memory.write(handler, &bytes);
    set_handler(vm, vcpu, mode, vector, handler);
}

/// Where a vCPU begins after an exception.
pub fn handler(vm: &TestVm, vcpu: &mut Vcpu, mode: Mode, vector: u8) -> u64 {
    let low = vm.memory.read(gate(vcpu, mode, vector), 2);
    u64::from(u16::from_le_bytes([low[0], low[1]]))
}

/// Has a vCPU begin here after an exception.
pub fn set_handler(vm: &TestVm, vcpu: &mut Vcpu, mode: Mode, vector: u8, handler: u64) {
    let low = u16::try_from(handler).expect("the first 64 KiB");
    vm.memory
        .write(gate(vcpu, mode, vector), &low.to_le_bytes());
}

/// The entry of an exception in the table of its mode, which begins with the lowest bits of the
/// handler's address; the others are 0.
fn gate(vcpu: &mut Vcpu, mode: Mode, vector: u8) -> u64 {
    let (base, size) = match mode {
        Mode::Real => (0, 4),
        Mode::Long | Mode::Compat16 | Mode::Compat32 => (vcpu.sregs().idt.base, 16),
        _ => (vcpu.sregs().idt.base, 8),
    };
    base + size * u64::from(vector)
}

/// How many exceptions there were that [`survive`] takes.
pub fn faults(vm: &TestVm) -> u32 {
    let counter = vm.memory.number(FAULTS);
    counter.load(std::sync::atomic::Ordering::Relaxed)
}

/// Does what may fault; then the next instruction comes. Changes RBP.
pub fn attempt(code: &mut CodeAssembler, write: impl FnOnce(&mut CodeAssembler)) {
    let mut after = code.create_label();
    if code.bitness() == 64 {
        emit(code.lea(rbp, qword_ptr(after)));
        write(code);
        emit(code.set_label(&mut after));
        return;
    }
    // Elsewhere, a CALL tells where the next instruction is.
    let mut body = code.create_label();
    let mut tell = code.create_label();
    emit(code.jmp(tell));
    emit(code.set_label(&mut body));
    emit(if code.bitness() == 32 {
        code.pop(ebp)
    } else {
        code.pop(bp)
    });
    write(code);
    emit(code.jmp(after));
    emit(code.set_label(&mut tell));
    emit(code.call(body));
    emit(code.set_label(&mut after));
}

/// Where [`load_user`] has its code, as the guest sees it: memory at [`USER_GPA`].
pub const USER: u64 = HIGH + 2 * PAGE as u64;
/// A page that user space of the guest can use.
pub const USER_GPA: u64 = SCRATCH + 0x3000;

/// Has a vCPU in 64-bit mode run this code in user space; there, SYSCALL is the way out. Returns the
/// RIPs of what is executed before and after, as [`load`] does.
pub fn load_user(vm: &TestVm, vcpu: &mut Vcpu, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u64> {
    const SFMASK: u32 = 0xc000_0084;
    const SCE: u64 = 1;
    // SYSCALL gets to the end of what there is for CPL 0.
    let rips = load(vm, vcpu, Mode::Long, |code| {
        emit(code.mov(rcx, USER));
        emit(code.mov(r11, 0x202u64));
        emit(code.sysretq());
    });
    let end = rips[3];
    let mut code = CodeAssembler::new(64).expect("64-bit code");
    write(&mut code);
    emit(code.syscall());
    let bytes = code.assemble(USER).expect("code that can be encoded");
    vm.memory.write(USER_GPA, &bytes);
    let efer = vcpu.msr(EFER) | SCE;
    let star = 8 << 32 | 8 << 48;
    vcpu.set_msrs(&[(EFER, efer), (STAR, star), (LSTAR, end), (SFMASK, 0x300)]);
    rips
}
