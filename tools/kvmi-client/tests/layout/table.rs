// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Everything that Rust and C both define, under its name in C, with what Rust says about it.

use kvmi_client::abi::{
    access as page_access,
    arch::{DescriptorTable, EventMsrs, Regs, Segment, Sregs, VcpuEventArch},
    command::{
        CheckId, ControlCleanup, ControlEvents, Features, GetVersionReply, GuestRange, VmInfo,
    },
    dev::{self, Attach, VmMemory, VmStatus},
    event::{EventHeader, VcpuEvent},
    handshake::{ToolHello, VmmHello},
    hypercall,
    id::{VCPU_EVENT, VM_EVENT},
    ioctl::{self, EventTimeout, Feature, Hook},
    token::TOKEN_READ_ONLY,
    vcpu::{GPA_UNMAPPED, NO_EXCEPTION},
    vcpu_request::Action,
    wire::{self, ErrorCode, Header, VcpuHeader},
    Command, Event, KvmiError, Scope,
};

/// A structure.
pub struct Struct {
    /// Its type in C.
    pub c_type: &'static str,
    /// Its size.
    pub size: usize,
    /// Its fields: name in C, offset, size.
    pub fields: Vec<(&'static str, usize, usize)>,
}

/// Size of the field that `_get` gets.
fn size_of_field<T, F>(_get: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Describes a structure from its Rust definition. A field is named once if both languages agree
/// on its name, and `c = rust` if not.
macro_rules! describe {
    ($c:literal, $rust:ty { $($($field:ident).+ $(= $other:ident)?),* $(,)? }) => {
        $crate::table::Struct {
            c_type: $c,
            size: size_of::<$rust>(),
            fields: vec![$(describe!(@field $rust, $($field).+ $(, $other)?)),*],
        }
    };
    (@field $rust:ty, $field:ident) => { describe!(@field $rust, $field, $field) };
    (@field $rust:ty, $($c:ident).+, $field:ident) => {
        (
            stringify!($($c).+),
            std::mem::offset_of!($rust, $field),
            $crate::table::size_of_field(|value: &$rust| &value.$field),
        )
    };
}

// Below the macro, which they use.
mod access;
mod guest_event;
mod mem;
mod vcpu;

/// All structures.
pub fn structs() -> Vec<Struct> {
    let mut all = protocol();
    all.extend(control());
    all.extend(registers());
    all.extend(vcpu::structs());
    all.extend(guest_event::structs());
    all.extend(access::structs());
    all.extend(mem::structs());
    all
}

fn protocol() -> Vec<Struct> {
    vec![
        describe!("struct kvmi_msg_hdr", Header { id, size, seq }),
        describe!("struct kvmi_error_code", ErrorCode { err, padding }),
        describe!(
            "struct kvmi_vcpu_hdr",
            VcpuHeader {
                vcpu,
                padding1,
                padding2
            }
        ),
        describe!(
            "struct kvmi_features",
            Features {
                singlestep,
                padding
            }
        ),
        describe!(
            "struct kvmi_get_version_reply",
            GetVersionReply {
                version,
                max_msg_size,
                features
            }
        ),
        describe!(
            "struct kvmi_vm_check_command",
            CheckId {
                id,
                padding1,
                padding2
            }
        ),
        describe!(
            "struct kvmi_vm_check_event",
            CheckId {
                id,
                padding1,
                padding2
            }
        ),
        describe!(
            "struct kvmi_vm_get_info_reply",
            VmInfo {
                vcpu_count,
                padding
            }
        ),
        describe!(
            "struct kvmi_vm_control_events",
            ControlEvents {
                event_id,
                enable,
                padding1,
                padding2
            }
        ),
        describe!(
            "struct kvmi_vm_read_physical",
            GuestRange {
                gpa,
                size,
                padding1,
                padding2
            }
        ),
        // The data is a flexible array member: it adds nothing to the size.
        describe!(
            "struct kvmi_vm_write_physical",
            GuestRange {
                gpa,
                size,
                padding1,
                padding2
            }
        ),
        describe!(
            "struct kvmi_vm_control_cleanup",
            ControlCleanup { enable, padding }
        ),
        describe!("struct kvmi_event_hdr", EventHeader { event, padding }),
        describe!(
            "struct kvmi_vcpu_event",
            VcpuEvent {
                size,
                vcpu,
                padding,
                arch
            }
        ),
    ]
}

fn control() -> Vec<Struct> {
    vec![
        describe!(
            "struct kvmi_vmm_hello",
            VmmHello {
                struct_size,
                uuid,
                padding,
                start_time,
                name,
                max_gpa
            }
        ),
        describe!(
            "struct kvmi_tool_hello",
            ToolHello {
                struct_size,
                cookie_hash
            }
        ),
        describe!("struct kvm_introspection_hook", Hook { fd, padding, uuid }),
        describe!(
            "struct kvm_introspection_timeout",
            EventTimeout { ms, padding }
        ),
        describe!("struct kvm_introspection_feature", Feature { allow, id }),
        describe!(
            "struct kvmi_dev_attach",
            Attach {
                vm_fd,
                socket_fd,
                flags,
                padding,
                uuid
            }
        ),
        describe!(
            "struct kvmi_dev_vm_status",
            VmStatus {
                vm_fd,
                flags,
                max_gpa,
                memory_bytes,
                vcpu_count,
                vmm_pid,
                hooked_by,
                vcpus_served,
                commands,
                events,
                memslot_changes,
                held_ns,
                uuid,
            }
        ),
        describe!(
            "struct kvmi_dev_event_timeout",
            EventTimeout { ms, padding }
        ),
        describe!(
            "struct kvmi_dev_vm_memory",
            VmMemory {
                vm_fd,
                padding,
                gpa,
                size,
            }
        ),
    ]
}

fn registers() -> Vec<Struct> {
    vec![
        describe!(
            "struct kvm_regs",
            Regs {
                rax,
                rbx,
                rcx,
                rdx,
                rsi,
                rdi,
                rsp,
                rbp,
                r8,
                r9,
                r10,
                r11,
                r12,
                r13,
                r14,
                r15,
                rip,
                rflags,
            }
        ),
        describe!(
            "struct kvm_segment",
            Segment {
                base, limit, selector, type = type_, present, dpl, db, s, l, g, avl, unusable,
                padding,
            }
        ),
        describe!(
            "struct kvm_dtable",
            DescriptorTable {
                base,
                limit,
                padding
            }
        ),
        describe!(
            "struct kvm_sregs",
            Sregs {
                cs,
                ds,
                es,
                fs,
                gs,
                ss,
                tr,
                ldt,
                gdt,
                idt,
                cr0,
                cr2,
                cr3,
                cr4,
                cr8,
                efer,
                apic_base,
                interrupt_bitmap,
            }
        ),
        describe!(
            "struct kvmi_vcpu_event_arch",
            VcpuEventArch {
                mode,
                padding,
                regs,
                sregs,
                msrs
            }
        ),
        describe!(
            "__typeof__(((struct kvmi_vcpu_event_arch *)0)->msrs)",
            EventMsrs {
                sysenter_cs,
                sysenter_esp,
                sysenter_eip,
                efer,
                star,
                lstar,
                cstar,
                pat,
                shadow_gs,
            }
        ),
    ]
}

/// All constants of `linux/kvmi.h`: name, value.
pub fn constants() -> Vec<(String, i64)> {
    let mut all: Vec<(String, i64)> = [
        ("KVMI_VERSION", wire::VERSION.into()),
        ("KVMI_MAX_MSG_SIZE", wire::MAX_MSG_SIZE as i64),
        ("KVMI_VM_EVENT", VM_EVENT.into()),
        ("KVMI_VCPU_EVENT", VCPU_EVENT.into()),
        ("KVM_CAP_INTROSPECTION", ioctl::KVM_CAP_INTROSPECTION.into()),
        ("KVM_INTROSPECTION_HOOK", ioctl::HOOK.into()),
        ("KVM_INTROSPECTION_UNHOOK", ioctl::UNHOOK.into()),
        ("KVM_INTROSPECTION_COMMAND", ioctl::COMMAND.into()),
        ("KVM_INTROSPECTION_EVENT", ioctl::EVENT.into()),
        ("KVM_INTROSPECTION_PREUNHOOK", ioctl::PREUNHOOK.into()),
        (
            "KVM_INTROSPECTION_EVENT_TIMEOUT",
            ioctl::EVENT_TIMEOUT.into(),
        ),
        ("KVMI_GPA_UNMAPPED", GPA_UNMAPPED as i64),
        ("KVMI_TRAP_NO_EXCEPTION", NO_EXCEPTION.into()),
        ("KVMI_EVENT_ACTION_CONTINUE", Action::Continue.code().into()),
        ("KVMI_EVENT_ACTION_RETRY", Action::Retry.code().into()),
        ("KVMI_EVENT_ACTION_CRASH", Action::Crash.code().into()),
        ("KVMI_DEV_STATUS_HOOKED", dev::STATUS_HOOKED.into()),
        (
            "KVMI_DEV_STATUS_DISCONNECTED",
            dev::STATUS_DISCONNECTED.into(),
        ),
        ("KVMI_IO", dev::KVMI_IO.into()),
        ("KVMI_DEV_ATTACH", dev::ATTACH.into()),
        ("KVMI_DEV_VM_STATUS", dev::VM_STATUS.into()),
        ("KVMI_DEV_VM_MEMORY", dev::VM_MEMORY.into()),
        ("KVMI_DEV_EVENT_TIMEOUT", dev::EVENT_TIMEOUT.into()),
        ("KVMI_DEV_PAGE_WALKS", dev::PAGE_WALKS.into()),
        ("KVMI_DEV_VM_ACCESS", dev::VM_ACCESS.into()),
        ("KVMI_DEV_INTROSPECTOR", dev::INTROSPECTOR.into()),
        (
            "KVMI_DEV_STATUS_INTROSPECTOR",
            dev::STATUS_INTROSPECTOR.into(),
        ),
        ("KVMI_TOKEN_READ_ONLY", TOKEN_READ_ONLY.into()),
        ("KVM_HC_MEM_MAP", hypercall::MEM_MAP.into()),
        ("KVM_HC_MEM_UNMAP", hypercall::MEM_UNMAP.into()),
        ("KVM_HC_MEM_MAP_MANY", hypercall::MEM_MAP_MANY.into()),
        ("KVM_HC_MEM_UNMAP_MANY", hypercall::MEM_UNMAP_MANY.into()),
        ("KVMI_PAGE_ACCESS_R", page_access::R.into()),
        ("KVMI_PAGE_ACCESS_W", page_access::W.into()),
        ("KVMI_PAGE_ACCESS_X", page_access::X.into()),
        ("KVMI_GVA_UNKNOWN", page_access::GVA_UNKNOWN as i64),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    all.extend(guest_event::constants().map(|(name, value)| (name.to_owned(), value)));
    all.extend(mem::constants().map(|(name, value)| (name.to_owned(), value)));
    all.extend(
        Command::ALL
            .iter()
            .map(|c| (format!("KVMI_{}", c.name()), c.id().into())),
    );
    all.extend(Event::ALL.iter().map(|e| {
        let scope = match e.scope() {
            Scope::Vm => "VM",
            Scope::Vcpu => "VCPU",
        };
        (format!("KVMI_{scope}_EVENT_{}", e.name()), e.id().into())
    }));
    all
}

/// The error numbers: name, value. `linux/kvm_para.h` has those that the protocol did not add.
pub fn errors() -> impl Iterator<Item = (&'static str, i32)> {
    KvmiError::ALL.into_iter().map(|e| (e.name(), e.code()))
}
