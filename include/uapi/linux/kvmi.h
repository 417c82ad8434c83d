/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * The KVMI protocol (virtual-machine introspection for KVM) and /dev/kvmi.
 *
 * The same definitions, in Rust and with the rules that go with them, are in
 * rust/abi; a test compares the two.
 */
#ifndef _UAPI_LINUX_KVMI_H
#define _UAPI_LINUX_KVMI_H

#include <linux/ioctl.h>
#include <linux/kvm.h>
#include <linux/types.h>
#include <asm/kvmi.h>

#define KVMI_VERSION 1

/* Largest payload of a message, in either direction. */
#define KVMI_MAX_MSG_SIZE (8192 - sizeof(struct kvmi_msg_hdr))

/* Even ids concern the VM, odd ids one vCPU. */
#define KVMI_VM_MESSAGE_ID(n) ((n) << 1)
#define KVMI_VCPU_MESSAGE_ID(n) (((n) << 1) | 1)

/* Messages. */
enum {
	KVMI_VM_EVENT			= KVMI_VM_MESSAGE_ID(0),
	KVMI_GET_VERSION		= KVMI_VM_MESSAGE_ID(1),
	KVMI_VM_CHECK_COMMAND		= KVMI_VM_MESSAGE_ID(2),
	KVMI_VM_CHECK_EVENT		= KVMI_VM_MESSAGE_ID(3),
	KVMI_VM_GET_INFO		= KVMI_VM_MESSAGE_ID(4),
	KVMI_VM_CONTROL_EVENTS		= KVMI_VM_MESSAGE_ID(5),
	KVMI_VM_READ_PHYSICAL		= KVMI_VM_MESSAGE_ID(6),
	KVMI_VM_WRITE_PHYSICAL		= KVMI_VM_MESSAGE_ID(7),
	KVMI_VM_PAUSE_VCPU		= KVMI_VM_MESSAGE_ID(8),
	KVMI_VM_CONTROL_CLEANUP		= KVMI_VM_MESSAGE_ID(9),
	KVMI_VM_SET_PAGE_ACCESS		= KVMI_VM_MESSAGE_ID(10),
	KVMI_VM_GET_MAP_TOKEN		= KVMI_VM_MESSAGE_ID(11),

	KVMI_VCPU_EVENT			= KVMI_VCPU_MESSAGE_ID(0),
	KVMI_VCPU_GET_INFO		= KVMI_VCPU_MESSAGE_ID(1),
	KVMI_VCPU_CONTROL_EVENTS	= KVMI_VCPU_MESSAGE_ID(2),
	KVMI_VCPU_GET_REGISTERS		= KVMI_VCPU_MESSAGE_ID(3),
	KVMI_VCPU_SET_REGISTERS		= KVMI_VCPU_MESSAGE_ID(4),
	KVMI_VCPU_GET_CPUID		= KVMI_VCPU_MESSAGE_ID(5),
	KVMI_VCPU_CONTROL_CR		= KVMI_VCPU_MESSAGE_ID(6),
	KVMI_VCPU_INJECT_EXCEPTION	= KVMI_VCPU_MESSAGE_ID(7),
	KVMI_VCPU_GET_XCR		= KVMI_VCPU_MESSAGE_ID(8),
	KVMI_VCPU_GET_XSAVE		= KVMI_VCPU_MESSAGE_ID(9),
	KVMI_VCPU_SET_XSAVE		= KVMI_VCPU_MESSAGE_ID(10),
	KVMI_VCPU_GET_MTRR_TYPE		= KVMI_VCPU_MESSAGE_ID(11),
	KVMI_VCPU_CONTROL_MSR		= KVMI_VCPU_MESSAGE_ID(12),
	KVMI_VCPU_CONTROL_SINGLESTEP	= KVMI_VCPU_MESSAGE_ID(13),
	KVMI_VCPU_TRANSLATE_GVA		= KVMI_VCPU_MESSAGE_ID(14),
};

/* Events, in the event field of struct kvmi_event_hdr. */
enum {
	KVMI_VM_EVENT_UNHOOK		= KVMI_VM_MESSAGE_ID(0),

	KVMI_VCPU_EVENT_PAUSE		= KVMI_VCPU_MESSAGE_ID(0),
	KVMI_VCPU_EVENT_HYPERCALL	= KVMI_VCPU_MESSAGE_ID(1),
	KVMI_VCPU_EVENT_BREAKPOINT	= KVMI_VCPU_MESSAGE_ID(2),
	KVMI_VCPU_EVENT_CR		= KVMI_VCPU_MESSAGE_ID(3),
	KVMI_VCPU_EVENT_TRAP		= KVMI_VCPU_MESSAGE_ID(4),
	KVMI_VCPU_EVENT_XSETBV		= KVMI_VCPU_MESSAGE_ID(5),
	KVMI_VCPU_EVENT_DESCRIPTOR	= KVMI_VCPU_MESSAGE_ID(6),
	KVMI_VCPU_EVENT_MSR		= KVMI_VCPU_MESSAGE_ID(7),
	KVMI_VCPU_EVENT_PF		= KVMI_VCPU_MESSAGE_ID(8),
	KVMI_VCPU_EVENT_SINGLESTEP	= KVMI_VCPU_MESSAGE_ID(9),
};

/* Head of every message. */
struct kvmi_msg_hdr {
	__u16 id;
	__u16 size;		/* of the payload that follows */
	__u32 seq;
};

/* First part of every reply: 0 or a negative KVM_E* number. */
struct kvmi_error_code {
	__s32 err;
	__u32 padding;
};

/* First part of every vCPU command and of every reply to a vCPU event. */
struct kvmi_vcpu_hdr {
	__u16 vcpu;		/* index in order of creation */
	__u16 padding1;
	__u32 padding2;
};

struct kvmi_features {
	__u8 singlestep;
	__u8 padding[7];
};

struct kvmi_get_version_reply {
	__u32 version;
	__u32 max_msg_size;
	struct kvmi_features features;
};

struct kvmi_vm_check_command {
	__u16 id;
	__u16 padding1;
	__u32 padding2;
};

struct kvmi_vm_check_event {
	__u16 id;
	__u16 padding1;
	__u32 padding2;
};

struct kvmi_vm_get_info_reply {
	__u32 vcpu_count;
	__u32 padding[3];
};

struct kvmi_vm_control_events {
	__u16 event_id;
	__u8 enable;
	__u8 padding1;
	__u32 padding2;
};

struct kvmi_vm_read_physical {
	__u64 gpa;
	__u16 size;		/* 1 to 4096, not beyond the end of the page */
	__u16 padding1;
	__u32 padding2;
};

struct kvmi_vm_write_physical {
	__u64 gpa;
	__u16 size;		/* 1 to 4096, not beyond the end of the page */
	__u16 padding1;
	__u32 padding2;
	__u8 data[];
};

#define KVMI_TOKEN_READ_ONLY	(1 << 0)

/* May be left out: all 0. */
struct kvmi_vm_get_map_token {
	__u32 flags;
	__u32 padding;
};

struct kvmi_vm_get_map_token_reply {
	__u8 token[32];		/* good for one hypercall within 3 s */
};

struct kvmi_vm_pause_vcpu {
	__u16 vcpu;
	__u8 wait;		/* 1: reply when the vCPU is out of the guest */
	__u8 padding1;
	__u32 padding2;
};

struct kvmi_vm_control_cleanup {
	__u8 enable;
	__u8 padding[7];
};

#define KVMI_PAGE_ACCESS_R (1 << 0)
#define KVMI_PAGE_ACCESS_W (1 << 1)
#define KVMI_PAGE_ACCESS_X (1 << 2)

struct kvmi_page_access_entry {
	__u64 gpa;
	__u8 access;		/* what is allowed: KVMI_PAGE_ACCESS_* */
	__u8 padding[7];
};

struct kvmi_vm_set_page_access {
	__u16 count;
	__u16 padding1;
	__u32 padding2;
	struct kvmi_page_access_entry entries[];
};

/*
 * Requests of vCPU commands follow a struct kvmi_vcpu_hdr, replies a struct
 * kvmi_error_code.
 */

struct kvmi_vcpu_get_info_reply {
	__u64 tsc_speed;	/* in Hz */
};

struct kvmi_vcpu_control_events {
	__u16 event_id;
	__u8 enable;
	__u8 padding1;
	__u32 padding2;
};

struct kvmi_vcpu_get_registers {
	__u16 nmsrs;
	__u16 padding1;
	__u32 padding2;
	__u32 msrs_idx[];
};

struct kvmi_vcpu_get_registers_reply {
	__u32 mode;		/* default operand size in bytes: 2, 4 or 8 */
	__u32 padding;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_msrs msrs;
};

struct kvmi_vcpu_set_registers {
	struct kvm_regs regs;
};

struct kvmi_vcpu_get_cpuid {
	__u32 function;
	__u32 index;
};

struct kvmi_vcpu_get_cpuid_reply {
	__u32 eax;
	__u32 ebx;
	__u32 ecx;
	__u32 edx;
};

struct kvmi_vcpu_control_cr {
	__u8 cr;		/* 0, 3 or 4 */
	__u8 enable;
	__u16 padding1;
	__u32 padding2;
};

struct kvmi_vcpu_inject_exception {
	__u8 nr;
	__u8 padding1;
	__u16 padding2;
	__u32 error_code;
	__u64 address;		/* of a page fault */
};

struct kvmi_vcpu_get_xcr {
	__u8 xcr;		/* 0 */
	__u8 padding[7];
};

struct kvmi_vcpu_get_xcr_reply {
	__u64 value;
};

struct kvmi_vcpu_get_xsave_reply {
	struct kvm_xsave xsave;
};

struct kvmi_vcpu_set_xsave {
	struct kvm_xsave xsave;
};

struct kvmi_vcpu_get_mtrr_type {
	__u64 gpa;
};

struct kvmi_vcpu_get_mtrr_type_reply {
	__u8 type;		/* 0 UC, 1 WC, 4 WT, 5 WP, 6 WB */
	__u8 padding[7];
};

struct kvmi_vcpu_control_msr {
	__u8 enable;
	__u8 padding1;
	__u16 padding2;
	__u32 msr;		/* up to 0x1fff but 0x1db to 0x1de, 0xc0000000 to 0xc0001fff */
};

struct kvmi_vcpu_control_singlestep {
	__u8 enable;
	__u8 padding[7];
};

struct kvmi_vcpu_translate_gva {
	__u64 gva;
};

/* The gpa of an address that is not mapped. */
#define KVMI_GPA_UNMAPPED (~0ULL)

struct kvmi_vcpu_translate_gva_reply {
	__u64 gpa;
};

/* First part of every event. */
struct kvmi_event_hdr {
	__u16 event;
	__u16 padding[3];
};

/* Second part of a vCPU event; the event's own data follows @size bytes. */
struct kvmi_vcpu_event {
	__u16 size;
	__u16 vcpu;
	__u32 padding;
	struct kvmi_vcpu_event_arch arch;
};

struct kvmi_vcpu_event_breakpoint {
	__u64 gpa;		/* of the instruction, or KVMI_GPA_UNMAPPED */
	__u8 insn_len;
	__u8 padding[7];
};

struct kvmi_vcpu_event_cr {
	__u8 cr;		/* 0, 3 or 4 */
	__u8 padding[7];
	__u64 old_value;
	__u64 new_value;
};

/* The nr of a TRAP event that says that an injected exception got lost. */
#define KVMI_TRAP_NO_EXCEPTION 0xff

struct kvmi_vcpu_event_trap {
	__u8 nr;		/* vector of what is about to be delivered */
	__u8 padding1;
	__u16 padding2;
	__u32 error_code;
	__u64 address;		/* CR2, for a page fault */
};

/* Sent before the register changes. */
struct kvmi_vcpu_event_xsetbv {
	__u8 xcr;		/* 0 */
	__u8 padding[7];
	__u64 old_value;
	__u64 new_value;
};

#define KVMI_DESC_IDTR	1
#define KVMI_DESC_GDTR	2
#define KVMI_DESC_LDTR	3
#define KVMI_DESC_TR	4

struct kvmi_vcpu_event_descriptor {
	__u8 descriptor;	/* KVMI_DESC_* */
	__u8 write;		/* 1: loaded, 0: stored */
	__u8 padding[6];
};

struct kvmi_vcpu_event_msr {
	__u32 msr;
	__u32 padding;
	__u64 old_value;
	__u64 new_value;
};

/* The gva of a PF event whose gva is not known. */
#define KVMI_GVA_UNKNOWN (~0ULL)

struct kvmi_vcpu_event_pf {
	__u64 gva;
	__u64 gpa;
	__u8 access;		/* what the guest tries: one of KVMI_PAGE_ACCESS_* */
	__u8 padding1;
	__u16 padding2;
	__u32 padding3;
};

struct kvmi_vcpu_event_singlestep {
	__u8 failed;		/* 1: no instruction was executed */
	__u8 padding[7];
};

/* What to do about a vCPU event. */
enum {
	KVMI_EVENT_ACTION_CONTINUE	= 0,	/* go on as if not introspected */
	KVMI_EVENT_ACTION_RETRY		= 1,	/* run the instruction again */
	KVMI_EVENT_ACTION_CRASH		= 2,	/* stop the VM */
};

/* Reply to a vCPU event; follows a struct kvmi_vcpu_hdr. */
struct kvmi_vcpu_event_reply {
	__u8 action;
	__u8 event;		/* the one that this is the reply to */
	__u16 padding1;
	__u32 padding2;
};

/* These follow the reply to a CR or MSR event: what the register gets. */
struct kvmi_vcpu_event_cr_reply {
	__u64 new_val;
};

struct kvmi_vcpu_event_msr_reply {
	__u64 new_val;
};

/* Handshake, VMM to tool. */
struct kvmi_vmm_hello {
	__u32 struct_size;
	__u8 uuid[16];
	__u32 padding;
	__s64 start_time;	/* seconds since 1970 */
	char name[64];
	__u64 max_gpa;		/* older VMMs end before this */
};

/* Handshake, tool to VMM. */
struct kvmi_tool_hello {
	__u32 struct_size;
	__u8 cookie_hash[20];
};

/*
 * The ioctls on a VM file descriptor.  A patched linux/kvm.h has them; others
 * get them here.
 */
#ifndef KVM_INTROSPECTION_HOOK
#define KVM_CAP_INTROSPECTION 0x4b56

struct kvm_introspection_hook {
	__s32 fd;
	__u32 padding;
	__u8 uuid[16];
};

struct kvm_introspection_feature {
	__u32 allow;
	__s32 id;
};

#define KVM_INTROSPECTION_HOOK      _IOW(KVMIO, 0xc8, struct kvm_introspection_hook)
#define KVM_INTROSPECTION_UNHOOK    _IO(KVMIO, 0xc9)
#define KVM_INTROSPECTION_COMMAND   _IOW(KVMIO, 0xca, struct kvm_introspection_feature)
#define KVM_INTROSPECTION_EVENT     _IOW(KVMIO, 0xcb, struct kvm_introspection_feature)
#define KVM_INTROSPECTION_PREUNHOOK _IO(KVMIO, 0xcc)

/* When it is over for a vCPU that waits, the tool is disconnected. */
struct kvm_introspection_timeout {
	__u32 ms;		/* 0: for ever */
	__u32 padding;
};

#define KVM_INTROSPECTION_EVENT_TIMEOUT _IOW(KVMIO, 0xcd, struct kvm_introspection_timeout)
#endif

/* /dev/kvmi: hooks a VM whose VMM knows nothing of introspection. */
struct kvmi_dev_attach {
	__s32 vm_fd;
	__s32 socket_fd;
	__u32 flags;
	__u32 padding;
	__u8 uuid[16];
};

#define KVMI_DEV_STATUS_HOOKED		(1U << 0)
#define KVMI_DEV_STATUS_DISCONNECTED	(1U << 1)
#define KVMI_DEV_STATUS_INTROSPECTOR	(1U << 2)

struct kvmi_dev_vm_status {
	__s32 vm_fd;		/* in; all that follows: out */
	__u32 flags;
	__u64 max_gpa;
	__u64 memory_bytes;
	__u32 vcpu_count;
	__s32 vmm_pid;
	__s32 hooked_by;
	__u32 vcpus_served;
	__u64 commands;
	__u64 events;
	__u64 memslot_changes;
	__u64 held_ns;		/* spent waiting for replies to events */
	__u8 uuid[16];
};

struct kvmi_dev_vm_memory {
	__s32 vm_fd;
	__u32 padding;
	__u64 gpa;		/* in: from where on; out: begin of a slot */
	__u64 size;		/* out */
};

/* As struct kvm_introspection_timeout. */
struct kvmi_dev_event_timeout {
	__u32 ms;
	__u32 padding;
};

/* Whether accesses of the CPU to the guest's page tables make PF events. */
struct kvmi_dev_page_walks {
	__u32 report;
	__u32 padding;
};

struct kvmi_dev_vm_access {
	__s32 vm_fd;
	__u32 access;		/* out: what is allowed, KVMI_PAGE_ACCESS_* */
	__u64 gpa;		/* in: from where on; out: first restricted page */
	__u64 size;		/* out: of which the same is allowed */
};

/* Allows a VM's guest to map pages of VMs that are introspected, or forbids it. */
struct kvmi_dev_introspector {
	__s32 vm_fd;
	__u32 enable;		/* 0 or 1 */
};

#define KVMI_IO 0xB9
#define KVMI_DEV_ATTACH    _IOW(KVMI_IO, 0x00, struct kvmi_dev_attach)
#define KVMI_DEV_VM_STATUS _IOWR(KVMI_IO, 0x01, struct kvmi_dev_vm_status)
#define KVMI_DEV_VM_MEMORY _IOWR(KVMI_IO, 0x02, struct kvmi_dev_vm_memory)
#define KVMI_DEV_EVENT_TIMEOUT _IOW(KVMI_IO, 0x03, struct kvmi_dev_event_timeout)
#define KVMI_DEV_PAGE_WALKS _IOW(KVMI_IO, 0x04, struct kvmi_dev_page_walks)
#define KVMI_DEV_VM_ACCESS _IOWR(KVMI_IO, 0x05, struct kvmi_dev_vm_access)
#define KVMI_DEV_INTROSPECTOR _IOW(KVMI_IO, 0x06, struct kvmi_dev_introspector)

/*
 * Hypercalls of an introspector's guest.  The convention is KVM's: results are 0 or
 * more, or negative errors.
 */
#define KVM_HC_MEM_MAP		32	/* gva of a token, target's gpa, own gpa */
#define KVM_HC_MEM_UNMAP	33	/* own gpa */
#define KVM_HC_MEM_MAP_MANY	35	/* gva of a token, gpa of kvmi_map_entry[], count */
#define KVM_HC_MEM_UNMAP_MANY	36	/* gpa of an array of own gpas, count */

/* An array of these begins where a page does, and ends in the same page. */
struct kvmi_map_entry {
	__u64 target_gpa;
	__u64 gpa;
};

#endif /* _UAPI_LINUX_KVMI_H */
