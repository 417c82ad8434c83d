/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/* The KVMI protocol: state of an x86 vCPU. */
#ifndef _UAPI_ASM_X86_KVMI_H
#define _UAPI_ASM_X86_KVMI_H

#include <asm/kvm.h>
#include <linux/types.h>

struct kvmi_vcpu_event_arch {
	__u8 mode;		/* default operand size in bytes: 2, 4 or 8 */
	__u8 padding[7];
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct {
		__u64 sysenter_cs;
		__u64 sysenter_esp;
		__u64 sysenter_eip;
		__u64 efer;
		__u64 star;
		__u64 lstar;
		__u64 cstar;
		__u64 pat;
		__u64 shadow_gs;
	} msrs;
};

#endif /* _UAPI_ASM_X86_KVMI_H */
