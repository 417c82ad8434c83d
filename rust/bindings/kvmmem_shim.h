/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What kvmmem needs of the kernel that is a macro or an inline function there.
 *
 * Not for kvmi_host: a guest's kernel need not have the KVM series.
 */
#ifndef KVMMEM_SHIM_H
#define KVMMEM_SHIM_H

#include <linux/mm_types.h>
#include <linux/types.h>

/* Whether there is a KVM below that can see this kernel's memory. */
bool kvmmem_host_is_kvm(void);

/* May take as long as the host likes; the caller may sleep, and holds no lock. */
long kvmmem_hypercall(unsigned int nr, unsigned long a0, unsigned long a1, unsigned long a2);

/* Takes a reference. */
void kvmmem_page_get(struct page *page);

phys_addr_t kvmmem_page_to_phys(struct page *page);

/* Whether the page is a part of something larger. */
bool kvmmem_page_is_large(struct page *page);

/* RLIMIT_MEMLOCK of the current process, in bytes. */
unsigned long kvmmem_memlock_limit(void);

/* memset() that the compiler keeps. */
void kvmmem_wipe(void *memory, size_t bytes);

#endif /* KVMMEM_SHIM_H */
