// SPDX-License-Identifier: GPL-2.0

//! What vCPU commands do, and what vCPU events carry. All on the vCPU's thread.

use kernel::prelude::*;
use kvmi_abi::{
    arch::{
        EventMsrs,
        Regs,
        VcpuEventArch, //
    },
    event::{
        EventHeader,
        VcpuEvent, //
    },
    mtrr::memory_type,
    vcpu::{
        GetRegistersReply,
        MsrEntry,
        MtrrTypeReply,
        TranslateGvaReply,
        VcpuInfo,
        XcrReply,
        XSAVE_SIZE, //
    },
    vcpu_request::MsrList,
    Event,
    KvmiError,
    VcpuRequest, //
};

use crate::{
    command::put,
    kvm::CurrentVcpu,
    vcpu::Vcpu, //
};

/// Executes `request`, puts the data of the reply to the begin of `scratch` and returns its length.
/// May sleep.
pub(crate) fn execute(
    vcpu: &Vcpu,
    current: &CurrentVcpu,
    request: VcpuRequest<'_>,
    scratch: &mut [u8],
    new_regs: &mut Option<Regs>,
) -> Result<usize, KvmiError> {
    match request {
        VcpuRequest::GetInfo => put(
            scratch,
            &VcpuInfo {
                tsc_speed: current.tsc_hz(),
            },
        ),
        VcpuRequest::ControlEvents { event, enable } => {
            vcpu.control_event(current, event, enable)?;
            Ok(0)
        }
        VcpuRequest::GetRegisters(msrs) => get_registers(current, msrs, scratch),
        VcpuRequest::SetRegisters(regs) => {
            if !vcpu.is_in_event() {
                return Err(KvmiError::OpNotSupp);
            }
            *new_regs = Some(regs);
            Ok(0)
        }
        VcpuRequest::GetCpuid(leaf) => put(scratch, &current.cpuid(leaf.function, leaf.index)?),
        VcpuRequest::InjectException(exception) => current.inject(&exception).map(|()| 0),
        VcpuRequest::ControlCr { cr, enable } => {
            current.track_cr(cr, enable);
            Ok(0)
        }
        VcpuRequest::ControlMsr { msr, enable } => current.track_msr(msr, enable).map(|()| 0),
        VcpuRequest::ControlSinglestep(enable) => current.trace(enable).map(|()| 0),
        VcpuRequest::GetXcr0 => put(
            scratch,
            &XcrReply {
                value: current.xcr0(),
            },
        ),
        VcpuRequest::GetXsave => {
            let area = scratch.first_chunk_mut().ok_or(KvmiError::TooBig)?;
            current.xsave(area)?;
            Ok(XSAVE_SIZE)
        }
        VcpuRequest::SetXsave(area) => current.set_xsave(area).map(|()| 0),
        VcpuRequest::GetMtrrType(gpa) => put(
            scratch,
            &MtrrTypeReply {
                type_: memory_type(gpa, |index| current.msr(index))?,
                padding: [0; 7],
            },
        ),
        VcpuRequest::TranslateGva(gva) => put(
            scratch,
            &TranslateGvaReply {
                gpa: current.gva_to_gpa(gva),
            },
        ),
    }
}

fn get_registers(
    current: &CurrentVcpu,
    msrs: MsrList<'_>,
    scratch: &mut [u8],
) -> Result<usize, KvmiError> {
    let head = GetRegistersReply {
        mode: current.mode(),
        padding: 0,
        regs: current.regs(),
        sregs: current.sregs(),
        nmsrs: u32::try_from(msrs.len()).map_err(|_| KvmiError::Inval)?,
        pad: 0,
    };
    let mut len = put(scratch, &head)?;
    for index in msrs.indices() {
        let entry = MsrEntry {
            index,
            reserved: 0,
            data: current.msr(index)?,
        };
        let rest = scratch.get_mut(len..).ok_or(KvmiError::TooBig)?;
        len += put(rest, &entry)?;
    }
    Ok(len)
}

/// Puts the body of an event to the begin of `scratch` and returns its length; 0 if there is no
/// room for it.
pub(crate) fn put_event(
    vcpu: &Vcpu,
    current: &CurrentVcpu,
    event: Event,
    specific: &[u8],
    scratch: &mut [u8],
) -> usize {
    #[derive(IntoBytes, zerocopy_derive::Immutable)]
    #[repr(C)]
    struct Common {
        header: EventHeader,
        vcpu: VcpuEvent,
    }

    const SIZE: u16 = 544;
    const _: () = assert!(size_of::<VcpuEvent>() == SIZE as usize);

    let common = Common {
        header: EventHeader {
            event: event.id(),
            padding: [0; 3],
        },
        vcpu: VcpuEvent {
            size: SIZE,
            vcpu: vcpu.index(),
            padding: 0,
            arch: event_arch(current),
        },
    };
    let Ok(len) = put(scratch, &common) else {
        return 0;
    };
    let end = len + specific.len();
    match scratch.get_mut(len..end) {
        Some(slot) => {
            slot.copy_from_slice(specific);
            end
        }
        None => 0,
    }
}

/// The state that every event of a vCPU carries.
fn event_arch(current: &CurrentVcpu) -> VcpuEventArch {
    // These exist on every CPU that KVM runs on; one that the guest's CPUID hides reads as 0.
    let msr = |index| current.msr(index).unwrap_or_default();

    VcpuEventArch {
        // Lossless: 2, 4 or 8.
        mode: current.mode() as u8,
        padding: [0; 7],
        regs: current.regs(),
        sregs: current.sregs(),
        msrs: EventMsrs {
            sysenter_cs: msr(0x174),
            sysenter_esp: msr(0x175),
            sysenter_eip: msr(0x176),
            efer: msr(0xc000_0080),
            star: msr(0xc000_0081),
            lstar: msr(0xc000_0082),
            cstar: msr(0xc000_0083),
            pat: msr(0x277),
            shadow_gs: msr(0xc000_0102),
        },
    }
}
