// SPDX-License-Identifier: GPL-2.0

//! What an attached VM is for: to be introspected, or to introspect others.

use kernel::{
    prelude::*,
    sync::Arc, //
};

use crate::{
    introspector::Introspector,
    ioctl,
    kvm::{
        AttachedVm,
        CurrentVcpu,
        GuestCall,
        Provider,
        SlotChange,
        VcpuRemote,
        Vm,
        VmId,
        WorkDone, //
    },
    registry,
    session::Session,
    vcpu::Vcpu, //
};

/// The part that a VM plays.
#[derive(Clone)]
pub(crate) enum Role {
    /// A tool is hooked to it.
    Target(Arc<Session>),
    /// Its guest may map pages of targets.
    Introspector(Arc<Introspector>),
}

impl Role {
    pub(crate) fn vm_id(&self) -> VmId {
        match self {
            Self::Target(session) => session.vm_id(),
            Self::Introspector(introspector) => introspector.vm_id(),
        }
    }

    /// Whether this has begun, and not ended yet.
    pub(crate) fn is_played(&self) -> bool {
        match self {
            Self::Target(session) => session.is_hooked(),
            Self::Introspector(introspector) => introspector.is_appointed(),
        }
    }

    /// Whether both are the same part of the same VM, at the same time.
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Target(a), Self::Target(b)) => Arc::ptr_eq(a, b),
            (Self::Introspector(a), Self::Introspector(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// What is kept for a vCPU.
pub(crate) enum RoleVcpu {
    Target(Arc<Vcpu>),
    Introspector(Arc<Introspector>),
}

impl Provider for Role {
    type Vcpu = RoleVcpu;

    const VERSION: u32 = kvmi_abi::wire::VERSION;

    fn vm_ioctl(vm: &Vm, cmd: u32, arg: usize) -> Result<isize> {
        ioctl::vm_ioctl(vm, cmd, arg)
    }

    fn vm_destroy(vm: &Vm) {
        match registry::find(vm.id()) {
            Some(Self::Target(session)) => session.unhook(),
            Some(Self::Introspector(introspector)) => introspector.dismiss(),
            None => {}
        }
    }

    fn vm(&self) -> &AttachedVm {
        match self {
            Self::Target(session) => session.vm(),
            Self::Introspector(introspector) => introspector.vm(),
        }
    }

    fn vcpu_create(&self, index: u32, remote: Arc<VcpuRemote>) -> Result<RoleVcpu> {
        match self {
            Self::Target(session) => Ok(RoleVcpu::Target(session.create_vcpu(index, remote)?)),
            Self::Introspector(introspector) => Ok(RoleVcpu::Introspector(introspector.clone())),
        }
    }

    fn vcpu_destroy(vcpu: &RoleVcpu) {
        if let RoleVcpu::Target(vcpu) = vcpu {
            vcpu.session().remove_vcpu(vcpu.index());
        }
    }

    fn memslot(&self, _change: SlotChange) {
        if let Self::Target(session) = self {
            session.memory_changed();
        }
    }

    fn vcpu_work(vcpu: &RoleVcpu, current: &CurrentVcpu) -> Result<WorkDone> {
        match vcpu {
            RoleVcpu::Target(vcpu) => vcpu.work(current),
            RoleVcpu::Introspector(_) => Ok(WorkDone::Enter),
        }
    }

    fn hypercall(vcpu: &RoleVcpu, current: &CurrentVcpu, call: &GuestCall) -> Result<Option<i64>> {
        match vcpu {
            RoleVcpu::Target(_) => Ok(None),
            RoleVcpu::Introspector(introspector) => {
                introspector.hypercall(current, call.nr, &call.args, call.cpl)
            }
        }
    }
}
