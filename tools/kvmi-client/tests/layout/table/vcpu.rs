// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The structures of vCPU commands, vCPU events and the replies to both.

use kvmi_client::abi::{
    arch::Regs,
    command::ControlEvents,
    vcpu::{
        CpuidReply, EventReply, GetCpuid, GetMtrrType, GetRegisters, GetRegistersReply, GetXcr,
        InjectException, MsrEntry, MtrrTypeReply, PauseVcpu, TranslateGva, TranslateGvaReply,
        TrapEvent, VcpuInfo, XcrReply, XSAVE_SIZE,
    },
    wire::VcpuHeader,
};

use super::Struct;

/// All of them.
pub fn structs() -> Vec<Struct> {
    let mut all = state();
    all.extend(queries());
    all.extend(events());
    all
}

/// Registers and what else a vCPU consists of.
fn state() -> Vec<Struct> {
    vec![
        // The MSRs are flexible array members: they add nothing to the sizes.
        describe!(
            "struct kvmi_vcpu_get_registers",
            GetRegisters {
                nmsrs,
                padding1,
                padding2
            }
        ),
        describe!(
            "struct kvmi_vcpu_get_registers_reply",
            GetRegistersReply {
                mode,
                padding,
                regs,
                sregs,
                msrs.nmsrs = nmsrs,
                msrs.pad = pad,
            }
        ),
        describe!(
            "struct kvm_msr_entry",
            MsrEntry {
                index,
                reserved,
                data
            }
        ),
        whole("struct kvmi_vcpu_set_registers", "regs", size_of::<Regs>()),
        whole("struct kvmi_vcpu_get_xsave_reply", "xsave", XSAVE_SIZE),
        whole("struct kvmi_vcpu_set_xsave", "xsave", XSAVE_SIZE),
        describe!("struct kvmi_vcpu_get_xcr", GetXcr { xcr, padding }),
        describe!("struct kvmi_vcpu_get_xcr_reply", XcrReply { value }),
    ]
}

/// Other commands.
fn queries() -> Vec<Struct> {
    vec![
        describe!(
            "struct kvmi_vm_pause_vcpu",
            PauseVcpu {
                vcpu,
                wait,
                padding1,
                padding2
            }
        ),
        describe!("struct kvmi_vcpu_get_info_reply", VcpuInfo { tsc_speed }),
        describe!(
            "struct kvmi_vcpu_control_events",
            ControlEvents {
                event_id,
                enable,
                padding1,
                padding2
            }
        ),
        describe!("struct kvmi_vcpu_get_cpuid", GetCpuid { function, index }),
        describe!(
            "struct kvmi_vcpu_get_cpuid_reply",
            CpuidReply { eax, ebx, ecx, edx }
        ),
        describe!(
            "struct kvmi_vcpu_inject_exception",
            InjectException {
                nr,
                padding1,
                padding2,
                error_code,
                address
            }
        ),
        describe!("struct kvmi_vcpu_get_mtrr_type", GetMtrrType { gpa }),
        describe!(
            "struct kvmi_vcpu_get_mtrr_type_reply",
            MtrrTypeReply { type = type_, padding }
        ),
        describe!("struct kvmi_vcpu_translate_gva", TranslateGva { gva }),
        describe!(
            "struct kvmi_vcpu_translate_gva_reply",
            TranslateGvaReply { gpa }
        ),
    ]
}

fn events() -> Vec<Struct> {
    vec![
        describe!(
            "struct kvmi_vcpu_event_trap",
            TrapEvent {
                nr,
                padding1,
                padding2,
                error_code,
                address
            }
        ),
        without_vcpu_header(describe!(
            "struct kvmi_vcpu_event_reply",
            EventReply {
                vcpu,
                action,
                event,
                padding1,
                padding2
            }
        )),
    ]
}

/// A structure of one field, which Rust uses without a structure around it.
fn whole(c_type: &'static str, field: &'static str, size: usize) -> Struct {
    Struct {
        c_type,
        size,
        fields: vec![(field, 0, size)],
    }
}

/// What follows the vCPU header of a structure. C has the header as a structure of its own.
fn without_vcpu_header(mut whole: Struct) -> Struct {
    const HEADER: usize = size_of::<VcpuHeader>();
    let header = whole.fields.remove(0);
    assert_eq!((header.1, header.2), (0, HEADER));
    whole.size -= HEADER;
    for (_, offset, _) in &mut whole.fields {
        *offset -= HEADER;
    }
    whole
}
