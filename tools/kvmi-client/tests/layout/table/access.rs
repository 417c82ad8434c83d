// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The structures of page access.

use kvmi_client::abi::{
    access::{PageAccess, PfEvent, SetPageAccess},
    dev::{Introspector, PageWalks, VmAccess},
    hypercall::MapEntry,
    token::{GetMapToken, MapToken},
};

use super::Struct;

/// All of them.
pub fn structs() -> Vec<Struct> {
    vec![
        // The pages are a flexible array member.
        describe!(
            "struct kvmi_vm_set_page_access",
            SetPageAccess {
                count,
                padding1,
                padding2
            }
        ),
        describe!(
            "struct kvmi_page_access_entry",
            PageAccess {
                gpa,
                access,
                padding
            }
        ),
        describe!(
            "struct kvmi_vcpu_event_pf",
            PfEvent {
                gva,
                gpa,
                access,
                padding1,
                padding2,
                padding3
            }
        ),
        describe!(
            "struct kvmi_vm_get_map_token",
            GetMapToken { flags, padding }
        ),
        describe!("struct kvmi_vm_get_map_token_reply", MapToken { token = bytes }),
        describe!("struct kvmi_map_entry", MapEntry { target_gpa, gpa }),
        describe!(
            "struct kvmi_dev_introspector",
            Introspector { vm_fd, enable }
        ),
        describe!("struct kvmi_dev_page_walks", PageWalks { report, padding }),
        describe!(
            "struct kvmi_dev_vm_access",
            VmAccess {
                vm_fd,
                access,
                gpa,
                size
            }
        ),
    ]
}
