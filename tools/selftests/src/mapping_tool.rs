// SPDX-License-Identifier: GPL-2.0 OR MIT

//! An introspector: a VM whose guest maps pages of another one.

use std::{
    fs,
    time::{Duration, Instant},
};

use iced_x86::code_asm::*;
use kvmi_abi::{
    hypercall::{MapEntry, MEM_MAP, MEM_MAP_MANY, MEM_UNMAP, MEM_UNMAP_MANY},
    token::{GetMapToken, MapToken, TOKEN_READ_ONLY},
    Command, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    access_tool::{add_code, assemble, emit, CODE, NEXT, PLAIN, TARGET},
    guest::{Record, HIGH},
    registers::{EFER, LSTAR, STAR},
    sys,
    tool::{structure, Tool},
    util::wait_for,
    vcpu::{Exit, Vcpu},
    vm::{TestVm, PAGE, SCRATCH},
};

/// Where an introspector keeps the token that it presents.
pub const TOKEN: u64 = PLAIN + 64;
/// Where it has arrays.
pub const ARRAY: u64 = PLAIN + PAGE as u64;
const LOAD: u64 = CODE + 0x100;
const STORE: u64 = CODE + 0x200;
/// Where the kernel enters a program.
const ENTRY: u64 = CODE + 0x300;
/// Where programs enter the kernel.
const KERNEL: u64 = CODE + 0x400;

/// The page of the target that tests map.
pub const PAGE_OF_TARGET: u64 = NEXT;
/// Which page of the introspector stands for it.
pub const WINDOW: u64 = TARGET;

/// Errors of hypercalls.
pub const EPERM: i64 = -1;
pub const ENOENT: i64 = -2;
pub const EFAULT: i64 = -14;
pub const EINVAL: i64 = -22;
pub const E2BIG: i64 = -7;
pub const EALREADY: i64 = -114;
pub const ENOSYS: i64 = -1000;

/// A VM whose guest may map pages of others. Its guest does what the test says.
pub struct Introspector {
    /// The VM.
    pub vm: TestVm,
    /// Its vCPU.
    pub vcpu: Vcpu,
    /// A token that was of no use, and when it was asked for.
    token: Option<(MapToken, Instant)>,
}

impl Introspector {
    /// A VM that the administrator has made one.
    #[track_caller]
    pub fn new() -> Self {
        let introspector = Self::ordinary(TestVm::new());
        assert_eq!(introspector.appoint(1), Ok(()));
        introspector
    }

    /// A VM that is none.
    pub fn ordinary(mut vm: TestVm) -> Self {
        let vcpu = add_code(&mut vm, CODE, emit_hypercall);
        for (address, write) in [
            (
                LOAD,
                (|code| emit(code.mov(rax, qword_ptr(rsi)))) as fn(&mut CodeAssembler),
            ),
            (STORE, |code| emit(code.mov(qword_ptr(rsi), rax))),
        ] {
            vm.memory.write(address, &assemble(address, write));
        }
        let token = None;
        Self { vm, vcpu, token }
    }

    /// Makes the VM an introspector (1), or ends that (0).
    pub fn appoint(&self, enable: u32) -> Result<(), sys::Errno> {
        sys::introspector(sys::open_dev(), self.vm.raw_fd(), enable)
    }

    /// Has the guest make a hypercall; returns its result.
    #[track_caller]
    pub fn call(&mut self, nr: u32, args: [u64; 3]) -> i64 {
        self.vcpu.change_regs(|regs| {
            (regs.rip, regs.rax) = (CODE, nr.into());
            [regs.rbx, regs.rcx, regs.rdx] = args;
        });
        assert_eq!(self.vcpu.run_until_exit(), Exit::Out(0x10));
        self.vcpu.regs().rax as i64
    }

    /// Has a program of the guest make a hypercall; returns its result.
    #[track_caller]
    pub fn call_from_user_mode(&mut self, nr: u32, args: [u64; 3]) -> i64 {
        // The program's page is one of those that user mode may access.
        const PROGRAM: u64 = HIGH + 2 * PAGE as u64;
        const PROGRAM_GPA: u64 = SCRATCH + 0x3000;
        const SCE: u64 = 1;
        let mut program = CodeAssembler::new(64).expect("64-bit code");
        // SYSRET takes RCX for itself.
        emit(program.mov(rcx, r9));
        emit_hypercall(&mut program);
        emit(program.mov(r8, rax));
        emit(program.syscall());
        let program = program.assemble(PROGRAM).expect("code");
        self.vm.memory.write(PROGRAM_GPA, &program);
        self.vm
            .memory
            .write(KERNEL, &assemble(KERNEL, |code| emit(code.nop())));
        let mut entry = CodeAssembler::new(64).expect("64-bit code");
        emit(entry.sysretq());
        let entry = entry.assemble(ENTRY).expect("code");
        self.vm.memory.write(ENTRY, &entry);
        let efer = self.vcpu.msr(EFER) | SCE;
        let star = 8 << 32 | 8 << 48;
        self.vcpu
            .set_msrs(&[(EFER, efer), (STAR, star), (LSTAR, KERNEL)]);
        self.vcpu.change_regs(|regs| {
            (regs.rip, regs.rax) = (ENTRY, nr.into());
            [regs.rbx, regs.r9, regs.rdx] = args;
            (regs.rcx, regs.r11) = (PROGRAM, 0x202);
        });
        assert_eq!(self.vcpu.run_until_exit(), Exit::Out(0x10));
        self.vcpu.regs().r8 as i64
    }

    /// Has the guest present a token of this session, again with another one if the host is so slow
    /// that it may have expired; returns the result.
    #[track_caller]
    pub fn present(
        &mut self,
        tool: &mut Tool,
        mut call: impl FnMut(&mut Self, &MapToken) -> i64,
    ) -> i64 {
        const YOUNG: Duration = Duration::from_secs(1);
        const OLD: Duration = Duration::from_millis(2900);
        loop {
            let last = self.token.take().filter(|(_, at)| at.elapsed() < YOUNG);
            let (token, at) = last.unwrap_or_else(|| {
                let now = Instant::now();
                (tool.map_token(), now)
            });
            let result = call(self, &token);
            if result == ENOENT && at.elapsed() >= OLD {
                continue;
            }
            // There are only so many.
            self.token = (result != 0).then_some((token, at));
            return result;
        }
    }

    /// Has the guest map a page of this session's target in place of one of its own.
    #[track_caller]
    pub fn map_page(&mut self, tool: &mut Tool, target_gpa: u64, gpa: u64) -> i64 {
        self.present(tool, |guest, token| guest.map(token, target_gpa, gpa))
    }

    /// Has the guest present a token, to map a page in place of one of its own.
    #[track_caller]
    pub fn map(&mut self, token: &MapToken, target_gpa: u64, gpa: u64) -> i64 {
        self.vm.memory.write(TOKEN, &token.bytes);
        self.call(MEM_MAP, [TOKEN, target_gpa, gpa])
    }

    /// Has the guest unmap a page.
    #[track_caller]
    pub fn unmap(&mut self, gpa: u64) -> i64 {
        self.call(MEM_UNMAP, [gpa, 0, 0])
    }

    /// Has the guest map many pages.
    #[track_caller]
    pub fn map_many(&mut self, token: &MapToken, entries: &[MapEntry]) -> i64 {
        self.vm.memory.write(TOKEN, &token.bytes);
        self.vm.memory.write(ARRAY, entries.as_bytes());
        self.call(MEM_MAP_MANY, [TOKEN, ARRAY, entries.len() as u64])
    }

    /// Has the guest unmap many pages.
    #[track_caller]
    pub fn unmap_many(&mut self, gpas: &[u64]) -> i64 {
        self.vm.memory.write(ARRAY, gpas.as_bytes());
        self.call(MEM_UNMAP_MANY, [ARRAY, gpas.len() as u64, 0])
    }

    /// What the guest reads there.
    #[track_caller]
    pub fn load(&mut self, gpa: u64) -> u64 {
        self.vcpu
            .change_regs(|regs| (regs.rip, regs.rsi) = (LOAD, gpa));
        assert_eq!(self.vcpu.run_until_exit(), Exit::Out(0x10));
        self.vcpu.regs().rax
    }

    /// Has the guest write there.
    #[track_caller]
    pub fn store(&mut self, gpa: u64, value: u64) {
        self.vcpu
            .change_regs(|regs| (regs.rip, regs.rsi, regs.rax) = (STORE, gpa, value));
        assert_eq!(self.vcpu.run_until_exit(), Exit::Out(0x10));
    }
}

impl Introspector {
    /// Has the guest try to write there; returns what its handler has seen, from which it returns
    /// to try once more.
    #[track_caller]
    pub fn store_in_vain(&mut self, gpa: u64, value: u64) -> Record {
        let before = self.vm.record(0).count;
        self.vcpu
            .change_regs(|regs| (regs.rip, regs.rsi, regs.rax) = (STORE, gpa, value));
        self.vcpu.run();
        wait_for("there is a fault", || self.vm.record(0).count > before);
        self.vcpu.stop();
        self.vm.record(0)
    }
}

impl Tool {
    /// VM_GET_MAP_TOKEN
    #[track_caller]
    pub fn try_map_token(&mut self, flags: u32) -> Result<MapToken, KvmiError> {
        let request = GetMapToken { flags, padding: 0 };
        let reply = self.call(Command::VmGetMapToken, request.as_bytes())?;
        Ok(structure(Ok(reply)))
    }

    /// A token to map pages that can be written to.
    #[track_caller]
    pub fn map_token(&mut self) -> MapToken {
        self.try_map_token(0).expect("a token")
    }

    /// A token to map pages that can be read.
    #[track_caller]
    pub fn read_only_token(&mut self) -> MapToken {
        self.try_map_token(TOKEN_READ_ONLY).expect("a token")
    }
}

/// The instruction of this CPU.
fn emit_hypercall(code: &mut CodeAssembler) {
    emit(match is_amd() {
        true => code.vmmcall(),
        false => code.vmcall(),
    });
}

fn is_amd() -> bool {
    let cpus = fs::read_to_string("/proc/cpuinfo").expect("procfs is there");
    cpus.contains("svm")
}

/// A number that a guest reads.
#[track_caller]
pub fn number(vm: &TestVm, gpa: u64) -> u64 {
    let bytes = vm.memory.read(gpa, 8).try_into();
    u64::from_le_bytes(bytes.expect("eight bytes"))
}

/// A target whose pages begin with their addresses, its tool, and an introspector whose pages
/// begin with the complement of theirs.
#[track_caller]
pub fn scene() -> (TestVm, Tool, Introspector) {
    let target = TestVm::new();
    scene_with(target)
}

/// The same, with this target.
#[track_caller]
pub fn scene_with(target: TestVm) -> (TestVm, Tool, Introspector) {
    let introspector = Introspector::new();
    for page in 0..4 {
        let gpa = TARGET + page * PAGE as u64;
        target.memory.write(gpa, &gpa.to_le_bytes());
        introspector.vm.memory.write(gpa, &(!gpa).to_le_bytes());
    }
    let tool = target.hook_allowing_all();
    (target, tool, introspector)
}

/// Maps the page, and reads it.
#[track_caller]
pub fn map(tool: &mut Tool, introspector: &mut Introspector) {
    assert_eq!(introspector.map_page(tool, PAGE_OF_TARGET, WINDOW), 0);
    assert_eq!(introspector.load(WINDOW), PAGE_OF_TARGET);
}
