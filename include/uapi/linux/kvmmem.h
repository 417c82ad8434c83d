/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
#ifndef _UAPI_LINUX_KVMMEM_H
#define _UAPI_LINUX_KVMMEM_H

/*
 * /dev/kvmmem: a program in one VM maps memory of another VM. Pages of the
 * program are replaced by pages of that VM: pages of a mapping of the device
 * (recommended), or anonymous ones.
 */

#include <linux/ioctl.h>
#include <linux/types.h>

/* One page. It may be anonymous: private, writable and not huge. */
struct kvmi_mem_map {
	__u64 token[4];	/* from KVMI_VM_GET_MAP_TOKEN; used up by success only */
	__u64 gpa;	/* page in the other VM */
	__u64 gva;	/* page of the caller to be replaced */
};

/* Pages of one mapping of the device: all are mapped, or none. */
struct kvmi_mem_map_many {
	__u64 token[4];
	__u64 gva;	/* the first page to be replaced */
	__u64 gpas;	/* address of an array of count __u64: pages in the other VM */
	__u32 count;	/* 1 .. KVM_INTRO_MAX_MAP_PAGES */
	__u32 padding;	/* 0 */
};

/* Every page of the range that is mapped; the ioctl returns how many were. */
struct kvmi_mem_unmap_many {
	__u64 gva;
	__u32 count;	/* 1 .. KVM_INTRO_MAX_AREA_PAGES */
	__u32 padding;	/* 0 */
};

/* Pages that one token is good for. */
#define KVM_INTRO_MAX_MAP_PAGES		256
/* Pages of one mapping of the device. */
#define KVM_INTRO_MAX_AREA_PAGES	65536

#define KVM_INTRO_MEM_MAP		_IOW('i', 1, struct kvmi_mem_map)
/* Takes the page's address by value. */
#define KVM_INTRO_MEM_UNMAP		_IOW('i', 2, unsigned long)
#define KVM_INTRO_MEM_MAP_MANY		_IOW('i', 3, struct kvmi_mem_map_many)
#define KVM_INTRO_MEM_UNMAP_MANY	_IOW('i', 4, struct kvmi_mem_unmap_many)

#endif /* _UAPI_LINUX_KVMMEM_H */
