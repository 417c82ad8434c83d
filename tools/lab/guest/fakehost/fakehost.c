// SPDX-License-Identifier: GPL-2.0
/*
 * A host that maps pages, but for the mapping: built into kvmmem.ko in the place of
 * the hypercalls, it keeps to their rules, keeps account, and fails on demand.
 *
 * It is there for what a real host does rarely or never: to refuse.  Its knobs are
 * parameters of the module, in /sys/module/kvmmem/parameters.
 */
#include <linux/bitmap.h>
#include <linux/errno.h>
#include <linux/io.h>
#include <linux/lockdep.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/sched.h>

#include "../../../../rust/bindings/kvmmem_shim.h"

enum { MEM_MAP = 32, MEM_UNMAP = 33, MEM_MAP_MANY = 35, MEM_UNMAP_MANY = 36 };

#define FAKE_GOOD_TOKEN	0x600dUL
#define FAKE_TOKENS	65536
#define FAKE_FRAMES	(1UL << 22)
/* The other VM's memory ends here. */
#define FAKE_MAX_GPA	(1UL << 40)

/* Protects all that follows. */
static DEFINE_MUTEX(fake_lock);
static DECLARE_BITMAP(fake_issued, FAKE_TOKENS);
static DECLARE_BITMAP(fake_foreign, FAKE_FRAMES);
/* Those that were mapped since an unmapping was refused. */
static DECLARE_BITMAP(fake_recent, FAKE_FRAMES);
static unsigned int fake_last_token;

/* Calls that were against the rules. */
static int fake_complaints;
module_param(fake_complaints, int, 0600);

/* What mapping fails with, as a positive number, and how often; so many calls later. */
static int fake_map_error, fake_map_errors;
module_param(fake_map_error, int, 0600);
module_param(fake_map_errors, int, 0600);

/* The same for each page that is to be unmapped. */
static int fake_unmap_error, fake_unmap_errors, fake_unmap_after;
module_param(fake_unmap_error, int, 0600);
module_param(fake_unmap_errors, int, 0600);
module_param(fake_unmap_after, int, 0600);

/* Calls so far. */
static int fake_calls;
module_param(fake_calls, int, 0600);

static int fake_foreign_get(char *buffer, const struct kernel_param *kp)
{
	unsigned long pfn, count = 0;

	mutex_lock(&fake_lock);
	for_each_set_bit(pfn, fake_foreign, FAKE_FRAMES) {
		count++;
		/* The allocator has it, or whoever got it from there. */
		if (!page_count(pfn_to_page(pfn)))
			fake_complaints++;
	}
	mutex_unlock(&fake_lock);
	return sysfs_emit(buffer, "%lu\n", count);
}

static const struct kernel_param_ops fake_foreign_ops = { .get = fake_foreign_get };
/* Pages that are another VM's. */
module_param_cb(fake_foreign, &fake_foreign_ops, NULL, 0400);

static int fake_token_get(char *buffer, const struct kernel_param *kp)
{
	unsigned int token;

	mutex_lock(&fake_lock);
	token = ++fake_last_token % FAKE_TOKENS;
	__set_bit(token, fake_issued);
	mutex_unlock(&fake_lock);
	return sysfs_emit(buffer, "%u\n", token);
}

static const struct kernel_param_ops fake_token_ops = { .get = fake_token_get };
/* A new token's second word; the first one is FAKE_GOOD_TOKEN. */
module_param_cb(fake_token, &fake_token_ops, NULL, 0400);

static int fake_forget_set(const char *value, const struct kernel_param *kp)
{
	mutex_lock(&fake_lock);
	bitmap_andnot(fake_foreign, fake_foreign, fake_recent, FAKE_FRAMES);
	mutex_unlock(&fake_lock);
	return 0;
}

static const struct kernel_param_ops fake_forget_ops = { .set = fake_forget_set };
/* All that was mapped since the last page was refused is not mapped any more. */
module_param_cb(fake_forget, &fake_forget_ops, NULL, 0200);

static long complain(const char *what)
{
	fake_complaints++;
	pr_err("fakehost: %s\n", what);
	return -EINVAL;
}

static bool frame_is_fine(u64 gpa)
{
	return !(gpa & ~PAGE_MASK) && (gpa >> PAGE_SHIFT) < FAKE_FRAMES &&
	       pfn_valid(gpa >> PAGE_SHIFT) && page_count(pfn_to_page(gpa >> PAGE_SHIFT));
}

/* Whether an error is due, of so many. */
static bool is_due(int error, int *errors)
{
	if (!error || *errors <= 0)
		return false;
	--*errors;
	return true;
}

static long may_map(u64 target_gpa, u64 gpa)
{
	if (!frame_is_fine(gpa) || target_gpa & ~PAGE_MASK)
		return complain("an address is wrong");
	if (target_gpa >= FAKE_MAX_GPA)
		return -EFAULT;
	return test_bit(gpa >> PAGE_SHIFT, fake_foreign) ? -EALREADY : 0;
}

/* Entries are pairs of the page in the other VM, and the one here. */
static long map(const u64 *token, const u64 *entries, unsigned long count)
{
	unsigned long i;
	long error;

	if (offset_in_page(token) > PAGE_SIZE - 32 || !virt_addr_valid(token))
		return complain("the token is not within a page of the kernel");
	if (token[0] != FAKE_GOOD_TOKEN || token[1] >= FAKE_TOKENS ||
	    !test_bit(token[1], fake_issued))
		return -ENOENT;
	if (is_due(fake_map_error, &fake_map_errors))
		return -fake_map_error;
	for (i = 0; i < count; i++) {
		error = may_map(entries[2 * i], entries[2 * i + 1]);
		if (error)
			return error;
	}
	for (i = 0; i < count; i++) {
		if (__test_and_set_bit(entries[2 * i + 1] >> PAGE_SHIFT, fake_foreign))
			complain("a page is there twice");
		__set_bit(entries[2 * i + 1] >> PAGE_SHIFT, fake_recent);
	}
	__clear_bit(token[1], fake_issued);
	return 0;
}

static long unmap(u64 gpa)
{
	if (!frame_is_fine(gpa))
		return complain("a page was given up that is another VM's");
	if (fake_unmap_after > 0) {
		fake_unmap_after--;
	} else if (is_due(fake_unmap_error, &fake_unmap_errors)) {
		__clear_bit(gpa >> PAGE_SHIFT, fake_recent);
		return -fake_unmap_error;
	}
	return __test_and_clear_bit(gpa >> PAGE_SHIFT, fake_foreign) ? 0 : -ENOENT;
}

static long unmap_many(const u64 *gpas, unsigned long count)
{
	unsigned long i;
	long error;

	for (i = 0; i < count; i++) {
		error = unmap(gpas[i]);
		if (error)
			return i ?: error;
	}
	return count;
}

bool kvmmem_host_is_kvm(void)
{
	/* There is no need for a guest, then. */
	return true;
}

long kvmmem_hypercall(unsigned int nr, unsigned long a0, unsigned long a1, unsigned long a2)
{
	u64 entry[] = { a1, a2 };
	long result = -1000;

	might_sleep();
	if (current->mm)
		lockdep_assert_not_held(&current->mm->mmap_lock);
	mutex_lock(&fake_lock);
	fake_calls++;
	switch (nr) {
	case MEM_MAP:
		result = map((void *)a0, entry, 1);
		break;
	case MEM_UNMAP:
		result = unmap(a0);
		break;
	case MEM_MAP_MANY:
		if (!frame_is_fine(a1) || !a2 || a2 > 256)
			result = complain("a batch is wrong");
		else
			result = map((void *)a0, phys_to_virt(a1), a2);
		break;
	case MEM_UNMAP_MANY:
		if (!frame_is_fine(a0) || !a1 || a1 > 512)
			result = complain("a batch is wrong");
		else
			result = unmap_many(phys_to_virt(a0), a1);
		break;
	}
	mutex_unlock(&fake_lock);
	return result;
}
