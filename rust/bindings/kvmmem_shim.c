// SPDX-License-Identifier: GPL-2.0
/* One function of the kernel each: there is nothing to decide here. */
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/string.h>

#include "kvmmem_shim.h"

void kvmmem_page_get(struct page *page)
{
	get_page(page);
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
