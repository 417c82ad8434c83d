// SPDX-License-Identifier: GPL-2.0
/*
 * Changes the code of the kernel that it runs in, as a rootkit would: writing
 * to /sys/module/patcher/parameters/text puts a RET (1), or what was there
 * before (0), at the beginning of a function that nobody calls; reading tells
 * which of them is there.
 *
 * Kernel code is mapped read-only, so it maps the page once more, somewhere
 * else: only the physical address gives it away.
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/reboot.h>
#include <linux/vmalloc.h>

#define RET 0xc3

static u8 original;

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

module_param_cb(text, &text_ops, NULL, 0600);
MODULE_PARM_DESC(text, "whether the kernel's code is changed");

static int __init patcher_init(void)
{
	original = READ_ONCE(*victim());
	return 0;
}
module_init(patcher_init);

static void __exit patcher_exit(void)
{
	set_text("0", NULL);
}
module_exit(patcher_exit);

MODULE_DESCRIPTION("Changes the code of the kernel, for a hypervisor to notice");
MODULE_LICENSE("GPL");
