// SPDX-License-Identifier: GPL-2.0
/*
 * Changes the kernel that it runs in, as a rootkit would, and back:
 *
 *  - writing to /sys/module/patcher/parameters/text puts a RET (1), or what was
 *    there before (0), at the beginning of a function that nobody calls.  Kernel
 *    code is mapped read-only, so it maps the page once more, somewhere else: only
 *    the physical address gives it away;
 *  - writing to parameters/table makes the pages of an area writable (1), or
 *    read-only (0), in the page table that maps them, without asking the kernel.
 *
 * Reading tells which of both is there.
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/reboot.h>
#include <linux/vmalloc.h>

#define RET 0xc3

static u8 original;
/* Fills what one page table maps, so that nobody else depends on that table. */
static u8 *area;

static u8 *victim(void)
{
	return (u8 *)orderly_poweroff;
}

/* Not inlined, so that it has a name of its own in /proc/kallsyms. */
static noinline void patch(u8 *where, u8 what)
{
	WRITE_ONCE(*where, what);
}

static int set_text(const char *value, const struct kernel_param *kp)
{
	struct page *page = pfn_to_page(__pa_symbol(victim()) >> PAGE_SHIFT);
	bool change;
	u8 *alias;
	int ret;

	ret = kstrtobool(value, &change);
	if (ret)
		return ret;
	alias = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!alias)
		return -ENOMEM;
	patch(alias + offset_in_page(victim()), change ? RET : original);
	vunmap(alias);
	return 0;
}

static int get_text(char *buffer, const struct kernel_param *kp)
{
	bool changed = READ_ONCE(*victim()) != original;

	return sysfs_emit(buffer, "%s\n", changed ? "changed" : "as built");
}

static const struct kernel_param_ops text_ops = {
	.set = set_text,
	.get = get_text,
};

/* Not inlined, so that it has a name of its own in /proc/kallsyms. */
static noinline void tamper(pte_t *pte, pteval_t value)
{
	WRITE_ONCE(pte->pte, value);
}

static u8 *in_area(void)
{
	return PTR_ALIGN(area, PMD_SIZE);
}

static int set_table(const char *value, const struct kernel_param *kp)
{
	unsigned int level;
	bool writable;
	pteval_t old;
	pte_t *pte;
	int ret;

	ret = kstrtobool(value, &writable);
	if (ret)
		return ret;
	pte = lookup_address((unsigned long)in_area(), &level);
	if (!pte || level != PG_LEVEL_4K)
		return -ENOENT;
	old = pte_val(READ_ONCE(*pte));
	tamper(pte, writable ? old | _PAGE_RW : old & ~_PAGE_RW);
	return 0;
}

/* Goes by what the CPU finds there, too: the area is read. */
static int get_table(char *buffer, const struct kernel_param *kp)
{
	unsigned int level;
	pte_t *pte = lookup_address((unsigned long)in_area(), &level);

	if (!pte || level != PG_LEVEL_4K || READ_ONCE(*in_area()))
		return -ENOENT;
	return sysfs_emit(buffer, "%s\n", pte_write(*pte) ? "changed" : "as built");
}

static const struct kernel_param_ops table_ops = {
	.set = set_table,
	.get = get_table,
};

static int get_where(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%#lx\n", (unsigned long)in_area());
}

static const struct kernel_param_ops where_ops = {
	.get = get_where,
};

module_param_cb(text, &text_ops, NULL, 0600);
MODULE_PARM_DESC(text, "whether the kernel's code is changed");

module_param_cb(table, &table_ops, NULL, 0600);
MODULE_PARM_DESC(table, "whether the area is writable");
module_param_cb(area, &where_ops, NULL, 0400);
MODULE_PARM_DESC(area, "the address of the area");

static int __init patcher_init(void)
{
	int ret;

	original = READ_ONCE(*victim());
	area = vzalloc(2 * PMD_SIZE);
	if (!area)
		return -ENOMEM;
	ret = set_table("0", NULL);
	if (ret)
		vfree(area);
	return ret;
}
module_init(patcher_init);

static void __exit patcher_exit(void)
{
	set_text("0", NULL);
	set_table("1", NULL);
	vfree(area);
}
module_exit(patcher_exit);

MODULE_DESCRIPTION("Changes the code of the kernel, for a hypervisor to notice");
MODULE_LICENSE("GPL");
