// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The commands of vCPUs. All of them take the vCPU's index in order of creation, which is not its
//! APIC id.
//!
//! They fail with `KVM_EINVAL` if there is no such vCPU, and with `KVM_EAGAIN` if the guest has not
//! started it yet. For how long they may take see [`Connection::vcpu_command`].

use std::os::fd::AsFd;

use kvmi_abi::{
    arch::Regs,
    command::ControlEvents,
    guest_control::{ControlCr, ControlMsr, ControlSinglestep},
    guest_event::Cr,
    vcpu::{
        CpuidReply, GetCpuid, GetMtrrType, GetRegisters, GetXcr, InjectException, MtrrTypeReply,
        PauseVcpu, TranslateGva, TranslateGvaReply, VcpuInfo, XcrReply, GPA_UNMAPPED, XSAVE_SIZE,
    },
    Command, Event as EventId,
};
use zerocopy::{FromBytes, IntoBytes as _};

use crate::{
    connection::Connection,
    error::{Error, Result},
    registers::Registers,
};

impl<S: AsFd> Connection<S> {
    /// Gives a command whose reply has a `T`.
    fn ask_vcpu<T: FromBytes>(&mut self, vcpu: u16, command: Command, request: &[u8]) -> Result<T> {
        let data = self.vcpu_command(vcpu, command, &[request])?;
        self.decode(&data)
    }

    /// Gives a command whose reply has no data.
    fn tell_vcpu(&mut self, vcpu: u16, command: Command, request: &[u8]) -> Result<()> {
        self.vcpu_command(vcpu, command, &[request]).map(drop)
    }

    /// Asks a vCPU to pause: it sends one [`Pause`](crate::VcpuEventKind::Pause) event for each
    /// time, after what else is to be done for it, and waits for the reply to that. With `wait`
    /// the vCPU is out of the guest when this returns.
    ///
    /// [`Connection::pause_all`] does this, and the rest, for all vCPUs.
    pub fn pause_vcpu(&mut self, vcpu: u16, wait: bool) -> Result<()> {
        let request = PauseVcpu {
            vcpu,
            wait: wait.into(),
            ..Default::default()
        };
        self.command(Command::VmPauseVcpu, &[request.as_bytes()])
            .map(drop)
    }

    /// Frequency of the TSC.
    pub fn vcpu_info(&mut self, vcpu: u16) -> Result<VcpuInfo> {
        self.ask_vcpu(vcpu, Command::VcpuGetInfo, &[])
    }

    /// Switches an event of a vCPU on or off.
    pub fn vcpu_control_events(&mut self, vcpu: u16, event: EventId, enable: bool) -> Result<()> {
        let request = ControlEvents {
            event_id: event.id(),
            enable: enable.into(),
            ..Default::default()
        };
        self.tell_vcpu(vcpu, Command::VcpuControlEvents, request.as_bytes())
    }

    /// Has writes to a control register make [`Cr`](crate::VcpuEventKind::Cr) events, as long as
    /// that event is switched on; or not any more.
    pub fn control_cr(&mut self, vcpu: u16, cr: Cr, enable: bool) -> Result<()> {
        let request = ControlCr {
            cr: cr.number(),
            enable: enable.into(),
            ..Default::default()
        };
        self.tell_vcpu(vcpu, Command::VcpuControlCr, request.as_bytes())
    }

    /// Has writes to an MSR make [`Msr`](crate::VcpuEventKind::Msr) events, as long as that event is
    /// switched on; or not any more. `KVM_EINVAL` unless the MSR is
    /// [one of those](kvmi_abi::guest_control::is_controllable_msr) that can, `KVM_EPERM` if the
    /// VMM denies the guest to write it.
    pub fn control_msr(&mut self, vcpu: u16, msr: u32, enable: bool) -> Result<()> {
        let request = ControlMsr {
            enable: enable.into(),
            msr,
            ..Default::default()
        };
        self.tell_vcpu(vcpu, Command::VcpuControlMsr, request.as_bytes())
    }

    /// Has each instruction make a [`Singlestep`](crate::VcpuEventKind::Singlestep) event, or not
    /// any more. `KVM_EOPNOTSUPP` if the CPU cannot do that, as
    /// [`Features::singlestep`](kvmi_abi::command::Features::singlestep) tells, too.
    pub fn control_singlestep(&mut self, vcpu: u16, enable: bool) -> Result<()> {
        let request = ControlSinglestep {
            enable: enable.into(),
            ..Default::default()
        };
        self.tell_vcpu(vcpu, Command::VcpuControlSinglestep, request.as_bytes())
    }

    /// Reads the registers, and the MSRs with the numbers `msrs`; `KVM_EINVAL` if one of those
    /// cannot be read.
    pub fn get_registers(&mut self, vcpu: u16, msrs: &[u32]) -> Result<Registers> {
        let request = GetRegisters {
            nmsrs: u16::try_from(msrs.len()).map_err(|_| Error::Range)?,
            ..Default::default()
        };
        let parts = [request.as_bytes(), msrs.as_bytes()];
        let data = self.vcpu_command(vcpu, Command::VcpuGetRegisters, &parts)?;
        Registers::decode(&data, msrs).map_err(|error| self.violated(error))
    }

    /// Sets the general registers of a vCPU that waits for the reply to an event; `KVM_EOPNOTSUPP`
    /// if it does not. They change when it gets the reply.
    pub fn set_registers(&mut self, vcpu: u16, regs: &Regs) -> Result<()> {
        self.tell_vcpu(vcpu, Command::VcpuSetRegisters, regs.as_bytes())
    }

    /// What the instruction CPUID gives the guest; `KVM_ENOENT` if the leaf does not exist.
    pub fn get_cpuid(&mut self, vcpu: u16, leaf: u32, subleaf: u32) -> Result<CpuidReply> {
        let request = GetCpuid {
            function: leaf,
            index: subleaf,
        };
        self.ask_vcpu(vcpu, Command::VcpuGetCpuid, request.as_bytes())
    }

    /// Injects an exception; `KVM_EBUSY` if one is under way. `error_code` counts for vectors that
    /// have one, and `address` for page faults.
    ///
    /// A [`Trap`](crate::VcpuEventKind::Trap) event then tells what is really delivered.
    pub fn inject_exception(
        &mut self,
        vcpu: u16,
        nr: u8,
        error_code: u32,
        address: u64,
    ) -> Result<()> {
        let request = InjectException {
            nr,
            error_code,
            address,
            ..Default::default()
        };
        self.tell_vcpu(vcpu, Command::VcpuInjectException, request.as_bytes())
    }

    /// Reads XCR0, which says what of the FPU's state the guest uses.
    pub fn get_xcr0(&mut self, vcpu: u16) -> Result<u64> {
        let request = GetXcr::default();
        let reply: XcrReply = self.ask_vcpu(vcpu, Command::VcpuGetXcr, request.as_bytes())?;
        Ok(reply.value)
    }

    /// Reads the state of the FPU, in the format of XSAVE.
    pub fn get_xsave(&mut self, vcpu: u16) -> Result<[u8; XSAVE_SIZE]> {
        self.ask_vcpu(vcpu, Command::VcpuGetXsave, &[])
    }

    /// Sets the state of the FPU, at once; `KVM_EINVAL` if the vCPU cannot have such a state.
    pub fn set_xsave(&mut self, vcpu: u16, area: &[u8; XSAVE_SIZE]) -> Result<()> {
        self.tell_vcpu(vcpu, Command::VcpuSetXsave, area)
    }

    /// Memory type of a page by the MTRRs: 0 uncacheable, 1 write-combining, 4 write-through,
    /// 5 write-protected, 6 write-back.
    pub fn get_mtrr_type(&mut self, vcpu: u16, gpa: u64) -> Result<u8> {
        let request = GetMtrrType { gpa };
        let command = Command::VcpuGetMtrrType;
        let reply: MtrrTypeReply = self.ask_vcpu(vcpu, command, request.as_bytes())?;
        Ok(reply.type_)
    }

    /// Translates a virtual address as the vCPU would at this moment; nothing if it is not mapped.
    pub fn translate_gva(&mut self, vcpu: u16, gva: u64) -> Result<Option<u64>> {
        let request = TranslateGva { gva };
        let command = Command::VcpuTranslateGva;
        let reply: TranslateGvaReply = self.ask_vcpu(vcpu, command, request.as_bytes())?;
        Ok(Some(reply.gpa).filter(|gpa| *gpa != GPA_UNMAPPED))
    }
}
