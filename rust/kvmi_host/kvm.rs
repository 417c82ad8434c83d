// SPDX-License-Identifier: GPL-2.0

//! The KVM series as safe Rust: everything in this module that talks to kvm.ko.
//!
//! C header: `include/linux/kvm_introspection.h`, added by `patches/`.

mod access;
mod event;
mod map;
mod provider;
mod vcpu;
mod vm;

pub(crate) use access::{
    Restriction,
    Violation, //
};
pub(crate) use event::{
    can_trace,
    GuestEvent, //
};
pub(crate) use map::{
    MapError,
    PageMap, //
};
pub(crate) use provider::{
    Attachment,
    GuestCall,
    Provider,
    Registration,
    SlotChange,
    WorkDone, //
};
pub(crate) use vcpu::{
    CurrentVcpu,
    VcpuRemote,
    Woken, //
};
pub(crate) use vm::{
    AttachedVm,
    Vm,
    VmId,
    VmRef, //
};
