// SPDX-License-Identifier: GPL-2.0
/* One function of the kernel each: there is nothing to decide here. */
#include <linux/cc_platform.h>
#include <linux/io.h>
#include <linux/kvm_para.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/string.h>

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

phys_addr_t kvmmem_page_to_phys(struct page *page)
{
	return page_to_phys(page);
}

bool kvmmem_page_is_large(struct page *page)
{
	return folio_test_large(page_folio(page));
}

unsigned long kvmmem_memlock_limit(void)
{
	return rlimit(RLIMIT_MEMLOCK);
}

void kvmmem_wipe(void *memory, size_t bytes)
{
	memzero_explicit(memory, bytes);
}
