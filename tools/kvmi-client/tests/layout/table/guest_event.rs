// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The structures of what the guest does by itself.

use kvmi_client::abi::{
    guest_control::{ControlCr, ControlMsr, ControlSinglestep},
    guest_event::{
        BreakpointEvent, CrEvent, DescriptorEvent, DescriptorRegister, MsrEvent, NewValueReply,
        SinglestepEvent, XsetbvEvent,
    },
};

use super::Struct;

/// All of them.
pub fn structs() -> Vec<Struct> {
    let mut all = commands();
    all.extend(events());
    all.extend(replies());
    all
}

fn commands() -> Vec<Struct> {
    vec![
        describe!(
            "struct kvmi_vcpu_control_cr",
            ControlCr {
                cr,
                enable,
                padding1,
                padding2
            }
        ),
        describe!(
            "struct kvmi_vcpu_control_msr",
            ControlMsr {
                enable,
                padding1,
                padding2,
                msr
            }
        ),
        describe!(
            "struct kvmi_vcpu_control_singlestep",
            ControlSinglestep { enable, padding }
        ),
    ]
}

fn events() -> Vec<Struct> {
    vec![
        describe!(
            "struct kvmi_vcpu_event_breakpoint",
            BreakpointEvent {
                gpa,
                insn_len,
                padding
            }
        ),
        describe!(
            "struct kvmi_vcpu_event_cr",
            CrEvent {
                cr,
                padding,
                old_value,
                new_value
            }
        ),
        describe!(
            "struct kvmi_vcpu_event_xsetbv",
            XsetbvEvent {
                xcr,
                padding,
                old_value,
                new_value
            }
        ),
        describe!(
            "struct kvmi_vcpu_event_descriptor",
            DescriptorEvent {
                descriptor,
                write,
                padding
            }
        ),
        describe!(
            "struct kvmi_vcpu_event_msr",
            MsrEvent {
                msr,
                padding,
                old_value,
                new_value
            }
        ),
        describe!(
            "struct kvmi_vcpu_event_singlestep",
            SinglestepEvent { failed, padding }
        ),
    ]
}

fn replies() -> Vec<Struct> {
    vec![
        describe!("struct kvmi_vcpu_event_cr_reply", NewValueReply { new_val }),
        describe!(
            "struct kvmi_vcpu_event_msr_reply",
            NewValueReply { new_val }
        ),
    ]
}

/// The numbers of descriptor-table registers.
pub fn constants() -> [(&'static str, i64); 4] {
    [
        ("KVMI_DESC_IDTR", DescriptorRegister::Idtr.number().into()),
        ("KVMI_DESC_GDTR", DescriptorRegister::Gdtr.number().into()),
        ("KVMI_DESC_LDTR", DescriptorRegister::Ldtr.number().into()),
        ("KVMI_DESC_TR", DescriptorRegister::Tr.number().into()),
    ]
}
