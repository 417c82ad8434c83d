// SPDX-License-Identifier: GPL-2.0
/* The way to the host. Tests have one of their own: tools/lab/guest/fakehost. */
#include <linux/cc_platform.h>
#include <linux/kvm_para.h>

#include "kvmmem_shim.h"

bool kvmmem_host_is_kvm(void)
{
	/* The host of a confidential guest could not even read a token. */
	return kvm_para_available() && !cc_platform_has(CC_ATTR_GUEST_MEM_ENCRYPT);
}

long kvmmem_hypercall(unsigned int nr, unsigned long a0, unsigned long a1, unsigned long a2)
{
	/* VMCALL or VMMCALL, by the vendor of the CPU. */
	return kvm_hypercall3(nr, a0, a1, a2);
}
