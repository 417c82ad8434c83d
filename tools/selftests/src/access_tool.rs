// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The tool's side of page access, and code whose accesses are counted.

use iced_x86::{code_asm::CodeAssembler, IcedError};
use kvmi_abi::{
    access::{PageAccess, PfEvent, SetPageAccess, ALL, R, W, X},
    command::ControlEvents,
    Command, Event, KvmiError,
};
use zerocopy::IntoBytes as _;

use crate::{
    guest::Mode,
    tool::{nothing, Tool},
    vcpu::{Exit, Vcpu},
    vcpu_tool::Paused,
    vm::{Guest, TestVm, PAGE, SCRATCH},
};

/// Where code of tests is.
pub const CODE: u64 = SCRATCH + 0x1_0000;
/// A page that tests restrict; the next three are free, too.
pub const TARGET: u64 = SCRATCH + 0x2_0000;
/// The page behind it.
pub const NEXT: u64 = TARGET + PAGE as u64;
/// Memory that nobody restricts.
pub const PLAIN: u64 = SCRATCH + 0x3_0000;

/// The payload of SET_PAGE_ACCESS.
pub fn access_request(pages: &[PageAccess]) -> Vec<u8> {
    let head = SetPageAccess {
        count: pages.len().try_into().expect("a number that can be told"),
        ..Default::default()
    };
    [head.as_bytes(), pages.as_bytes()].concat()
}

impl Tool {
    /// VM_SET_PAGE_ACCESS
    #[track_caller]
    pub fn set_access(&mut self, pages: &[PageAccess]) -> Result<(), KvmiError> {
        nothing(self.call(Command::VmSetPageAccess, &access_request(pages)))
    }

    /// Denies the guest accesses to a page, and allows the others.
    #[track_caller]
    pub fn deny(&mut self, gpa: u64, denied: u8) {
        let page = PageAccess::new(gpa, ALL & !denied);
        assert_eq!(self.set_access(&[page]), Ok(()));
    }

    /// Lets a vCPU run, with its PF events switched on.
    #[track_caller]
    pub fn run_wanting_pf(&mut self, vcpu: &mut Vcpu) {
        let seq = self.send_want_pf(vcpu.index);
        self.settle();
        vcpu.run();
        let reply = self.reply_to(Command::VcpuControlEvents.id(), seq);
        assert_eq!(nothing(reply), Ok(()));
    }

    /// Sends the command that switches PF events of a vCPU on; returns its sequence number.
    #[track_caller]
    pub fn send_want_pf(&mut self, vcpu: u16) -> u32 {
        let control = ControlEvents {
            event_id: Event::Pf.id(),
            enable: 1,
            ..Default::default()
        };
        self.send_to(vcpu, Command::VcpuControlEvents, control.as_bytes())
    }

    /// Switches PF events of a vCPU that runs on.
    #[track_caller]
    pub fn want_pf(&mut self, vcpu: u16) {
        let wanted = self.control_vcpu_event(vcpu, Event::Pf.id(), 1);
        assert_eq!(wanted, Ok(()));
    }

    /// Receives a PF event, and fails the test unless it is about this.
    #[track_caller]
    pub fn expect_pf(&mut self, vcpu: u16, gpa: u64, access: u8) -> Paused {
        let event = self.vcpu_event(vcpu, Event::Pf);
        let pf = event.pf.expect("what is specific to it");
        let rip = event.arch.regs.rip;
        assert_eq!(
            (format!("{:#x}", pf.gpa), name(pf.access)),
            (format!("{gpa:#x}"), name(access)),
            "at {rip:#x}: {pf:x?}"
        );
        event
    }

    /// Receives these events, and has the vCPU go on after each.
    #[track_caller]
    pub fn allow_pfs(&mut self, vcpu: u16, accesses: &[(u64, u8)]) {
        for (gpa, access) in accesses {
            let event = self.expect_pf(vcpu, *gpa, *access);
            self.resume(&event);
        }
    }
}

/// Checks what every PF event has in common.
#[track_caller]
pub fn expect_sound(pf: &PfEvent, arch: &kvmi_abi::arch::VcpuEventArch) {
    assert_eq!((pf.padding1, pf.padding2, pf.padding3), (0, 0, 0));
    assert!([R, W, X].contains(&pf.access), "{pf:x?}");
    // Guests of these tests have addresses mapped to themselves.
    assert!(
        pf.gva == u64::MAX || pf.gva == pf.gpa,
        "{pf:x?} {:x?}",
        arch.regs
    );
}

/// The name of a mask of accesses.
pub fn name(access: u8) -> String {
    let bit = |bit, name| if access & bit != 0 { name } else { '-' };
    [bit(R, 'r'), bit(W, 'w'), bit(X, 'x')].iter().collect()
}

/// Takes an instruction that was written.
#[track_caller]
pub fn emit(result: Result<(), IcedError>) {
    result.expect("an instruction");
}

/// Code that ends with a way out to the VMM.
pub fn assemble(address: u64, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    use iced_x86::code_asm::al;
    let mut code = CodeAssembler::new(64).expect("64-bit code");
    write(&mut code);
    emit(code.out(0x10, al));
    emit(code.hlt());
    code.assemble(address).expect("code that can be encoded")
}

/// A VM with one vCPU that is about to run this code at [`CODE`].
pub fn with_code(write: impl FnOnce(&mut CodeAssembler)) -> (TestVm, Vcpu) {
    let mut vm = TestVm::new();
    let vcpu = add_code(&mut vm, CODE, write);
    (vm, vcpu)
}

/// Adds a vCPU that is about to run this code.
pub fn add_code(vm: &mut TestVm, address: u64, write: impl FnOnce(&mut CodeAssembler)) -> Vcpu {
    vm.memory.write(address, &assemble(address, write));
    let mut vcpu = vm.control(Guest::Spin(Mode::Long));
    vcpu.change_regs(|regs| regs.rip = address);
    vcpu
}

/// Runs code and fails the test unless just these accesses are reported, each once, in this order,
/// and the guest gets to the end.
#[track_caller]
pub fn expect_accesses(tool: &mut Tool, vcpu: &mut Vcpu, accesses: &[(u64, u8)]) {
    tool.run_wanting_pf(vcpu);
    tool.allow_pfs(vcpu.index, accesses);
    assert_eq!(vcpu.exit(), Exit::Out(0x10));
    // There would be another event before the reply.
    tool.settle();
}
