/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * KVM introspection: the interface between kvm.ko and the one module that
 * implements introspection (the "provider", kvmi_host.ko).
 *
 * kvm.ko only offers hook points and narrow helpers; protocol and policy are
 * the provider's.  The provider never sees the layout of a KVM structure:
 * struct kvm and struct kvm_vcpu are opaque to it.
 *
 * Lock order, outermost first:
 *
 *   provider's per-VM lifecycle lock
 *     kvm_introspection_lock	(attach, detach, VM destruction)
 *       kvm->lock
 *         vcpu->mutex
 *           provider's inner locks (everything a callback may take)
 */
#ifndef __KVM_INTROSPECTION_H
#define __KVM_INTROSPECTION_H

#include <linux/types.h>

struct kvm;
struct kvm_regs;
struct kvm_sregs;
struct kvm_vcpu;
struct module;

/* Bumped with every change of this interface; checked at registration. */
#define KVM_INTROSPECTION_ABI	4

/**
 * enum kvmi_slot_change - what happened to a memory slot
 * @KVMI_SLOT_CREATE: a slot came into being
 * @KVMI_SLOT_DELETE: a slot went away
 * @KVMI_SLOT_MOVE: a slot has a new base gfn
 * @KVMI_SLOT_FLAGS: only the slot's flags changed
 */
enum kvmi_slot_change {
	KVMI_SLOT_CREATE,
	KVMI_SLOT_DELETE,
	KVMI_SLOT_MOVE,
	KVMI_SLOT_FLAGS,
};

/**
 * struct kvmi_vm_info - what an administrator wants to know about a VM
 * @max_gpa: first guest physical address past the highest memory slot
 * @memory_bytes: sum of all memory slots of address space 0
 * @vcpu_count: vCPUs that are online
 * @vmm_pid: process that created the VM, in the caller's pid namespace, or 0
 */
struct kvmi_vm_info {
	u64 max_gpa;
	u64 memory_bytes;
	u32 vcpu_count;
	s32 vmm_pid;
};

/**
 * struct kvmi_exception - an exception of the guest
 * @address: for a page fault the address, i.e. CR2; for #DB see
 *	kvmi_vcpu_inject() and kvmi_vcpu_get_trap(); else 0
 * @error_code: if there is one, else 0
 * @nr: the vector; %KVMI_NO_EXCEPTION in a trap: none was delivered
 * @has_error_code: is there an error code, 0 or 1
 * @padding: 0
 */
struct kvmi_exception {
	u64 address;
	u32 error_code;
	u8 nr;
	u8 has_error_code;
	u8 padding[2];
};

#define KVMI_NO_EXCEPTION	0xff

/* Kinds of access to guest memory. */
#define KVMI_ACCESS_R	1
#define KVMI_ACCESS_W	2
#define KVMI_ACCESS_X	4
#define KVMI_ACCESS_ALL	(KVMI_ACCESS_R | KVMI_ACCESS_W | KVMI_ACCESS_X)

/**
 * struct kvmi_page_access - what a guest may not do with a page
 * @gfn: the page
 * @denied: mask of %KVMI_ACCESS_R, %KVMI_ACCESS_W, %KVMI_ACCESS_X; 0 for an
 *	ordinary page
 * @error: out: 0 or an error that concerns this page only
 */
struct kvmi_page_access {
	u64 gfn;
	u32 denied;
	s32 error;
};

/* The access is one of the CPU's own, while it walks the guest's page tables. */
#define KVMI_VIOLATION_WALK	1
/* @gva is known. */
#define KVMI_VIOLATION_GVA	2

/**
 * struct kvmi_violation - the guest tries what it is denied
 * @gva: (linear) address that the guest uses, if known
 * @gpa: guest physical address that this leads to
 * @access: one of %KVMI_ACCESS_R, %KVMI_ACCESS_W, %KVMI_ACCESS_X; an instruction
 *	that reads and writes memory writes
 * @flags: mask of %KVMI_VIOLATION_WALK and %KVMI_VIOLATION_GVA
 */
struct kvmi_violation {
	u64 gva;
	u64 gpa;
	u32 access;
	u32 flags;
};

/**
 * struct kvmi_page_map - a page that stands for one of another VM
 * @gfn: the page
 * @target_gfn: that of the other VM
 */
struct kvmi_page_map {
	u64 gfn;
	u64 target_gfn;
};

/**
 * struct kvmi_hypercall - a guest calls the hypervisor
 * @nr: number of the call
 * @args: what it is about; all of it 32 bits wide outside of 64-bit code
 * @ret: out: the result
 * @cpl: privilege level of the caller
 * @padding: 0
 */
struct kvmi_hypercall {
	u64 nr;
	u64 args[4];
	u64 ret;
	u32 cpl;
	u32 padding;
};

/**
 * struct kvm_introspection_ops - the provider's callbacks
 * @owner: the provider's module; pinned while any VM is attached and during
 *	every callback
 * @abi: %KVM_INTROSPECTION_ABI
 * @size: sizeof(struct kvm_introspection_ops)
 * @version: answer to KVM_CHECK_EXTENSION(KVM_CAP_INTROSPECTION)
 * @reserved: 0
 * @vm_ioctl: One of the KVM_INTROSPECTION_* ioctls on a VM file descriptor.
 *	May sleep, no KVM lock is held; the file holds a reference to @kvm.
 * @vm_destroy: The last reference to an attached VM is gone and no vCPU can run
 *	any more.  The VM must have been detached when this returns.  May sleep.
 * @vcpu_create: A vCPU of an attached VM is there: once for each vCPU that
 *	exists when kvmi_vm_attach() is called, later for every new one.
 *	@vcpu stays valid until the matching @vcpu_destroy.  Called under
 *	kvm->lock, may sleep.  An error leaves that vCPU out of introspection;
 *	during kvmi_vm_attach() it fails the attach.
 * @vcpu_destroy: Undoes @vcpu_create; from kvmi_vm_detach(), when no other
 *	callback of the vCPU runs or will run.  May sleep.
 * @memslot: A memory slot has changed.  Called under kvm->slots_lock; may
 *	sleep, but must not change slots or wait for one who does.
 * @vcpu_work: Serves a kvmi_vcpu_request(): called on the vCPU's thread inside
 *	KVM_RUN, before the guest is entered and also when the vCPU is halted.
 *	kvm->srcu is held, no lock is; may sleep, but waits only through
 *	kvmi_vcpu_wait() or in kvmi_vcpu_unlocked().  Returns 1 to go on;
 *	-EINTR to leave KVM_RUN because of a signal and be called again at the
 *	next KVM_RUN; 0 to leave KVM_RUN with the exit reason that
 *	kvmi_vcpu_crash() has set.
 * @hypercall: The guest makes a hypercall by KVM's convention, whatever hypervisor
 *	it may have taken this for.  Called like @vcpu_work.  Returns 1 if the call
 *	was the provider's business; -EINTR to have the guest repeat the instruction,
 *	because of a signal that is pending; 0 if the call is not for the provider.
 *
 * @vcpu_create, @vcpu_destroy, @memslot, @vcpu_work and @hypercall get the pointers
 * that kvmi_vm_attach() and @vcpu_create handed over.
 */
struct kvm_introspection_ops {
	struct module *owner;
	u32 abi;
	u32 size;
	u32 version;
	u32 reserved;

	long (*vm_ioctl)(struct kvm *kvm, unsigned int ioctl, unsigned long arg);
	void (*vm_destroy)(struct kvm *kvm);
	int (*vcpu_create)(void *vm_priv, struct kvm_vcpu *vcpu, u32 index,
			   void **vcpu_priv);
	void (*vcpu_destroy)(void *vcpu_priv);
	void (*memslot)(void *vm_priv, u64 base_gfn, u64 npages, u32 as_id,
			enum kvmi_slot_change change);
	int (*vcpu_work)(void *vcpu_priv);
	int (*hypercall)(void *vcpu_priv, struct kvmi_hypercall *call);
};

/* For the provider: registration.  Process context, may sleep. */
int kvm_introspection_register(const struct kvm_introspection_ops *ops);
void kvm_introspection_unregister(const struct kvm_introspection_ops *ops);

/* For the provider: VMs. */
struct kvm *kvmi_vm_get_from_fd(int fd);
void kvmi_vm_put(struct kvm *kvm);
int kvmi_vm_may_attach(struct kvm *kvm);
int kvmi_vm_attach(struct kvm *kvm, void *vm_priv);
void kvmi_vm_detach(struct kvm *kvm);
void kvmi_vm_get_info(struct kvm *kvm, struct kvmi_vm_info *info);
int kvmi_vm_next_memory(struct kvm *kvm, u64 gpa, u64 *start, u64 *size);
int kvmi_vm_read_gpa(struct kvm *kvm, u64 gpa, void *buf, u32 len);
int kvmi_vm_write_gpa(struct kvm *kvm, u64 gpa, const void *buf, u32 len);

/* For the provider: access of the guest to its memory. */
bool kvmi_access_can_deny(u32 denied);
int kvmi_vm_set_access(struct kvm *kvm, struct kvmi_page_access *pages,
		       u32 count);
u32 kvmi_vm_next_access(struct kvm *kvm, u64 *gfn);
void kvmi_vm_clear_access(struct kvm *kvm);

/* For the provider: pages of other VMs. */
int kvmi_vcpu_map(struct kvm_vcpu *vcpu, struct kvm *target,
		  const struct kvmi_page_map *pages, u32 count, bool writable);
u32 kvmi_vcpu_unmap(struct kvm_vcpu *vcpu, const u64 *gfns, u32 count);
void kvmi_vm_take_back(struct kvm *kvm);

/* For the provider: vCPUs. */
void kvmi_vcpu_request(struct kvm_vcpu *vcpu);
void kvmi_vcpu_request_sync(struct kvm_vcpu *vcpu);
int kvmi_vcpu_wait(struct kvm_vcpu *vcpu, bool (*done)(void *arg), void *arg,
		   u64 timeout_ns);
void kvmi_vcpu_unlocked(struct kvm_vcpu *vcpu, void (*fn)(void *arg), void *arg);
void kvmi_vcpu_crash(struct kvm_vcpu *vcpu);

/* For the provider: state of a vCPU. */
void kvmi_vcpu_get_regs(struct kvm_vcpu *vcpu, struct kvm_regs *regs);
void kvmi_vcpu_set_regs(struct kvm_vcpu *vcpu, const struct kvm_regs *regs);
void kvmi_vcpu_get_sregs(struct kvm_vcpu *vcpu, struct kvm_sregs *sregs);
u32 kvmi_vcpu_get_mode(struct kvm_vcpu *vcpu);
int kvmi_vcpu_get_msr(struct kvm_vcpu *vcpu, u32 index, u64 *data);
int kvmi_vcpu_get_cpuid(struct kvm_vcpu *vcpu, u32 function, u32 index,
			u32 regs[4]);
u64 kvmi_vcpu_get_xcr0(struct kvm_vcpu *vcpu);
int kvmi_vcpu_get_xsave(struct kvm_vcpu *vcpu, void *buf, u32 len);
int kvmi_vcpu_set_xsave(struct kvm_vcpu *vcpu, const void *buf, u32 len);
u64 kvmi_vcpu_gva_to_gpa(struct kvm_vcpu *vcpu, u64 gva);
u64 kvmi_vcpu_tsc_hz(struct kvm_vcpu *vcpu);
bool kvmi_vcpu_is_initialized(struct kvm_vcpu *vcpu);

/* For the provider: exceptions. */
int kvmi_vcpu_inject(struct kvm_vcpu *vcpu, const struct kvmi_exception *ex);
bool kvmi_vcpu_get_trap(struct kvm_vcpu *vcpu, struct kvmi_exception *ex);

/* For the provider: accesses that are denied. */
bool kvmi_vcpu_get_violation(struct kvm_vcpu *vcpu,
			     struct kvmi_violation *violation);
void kvmi_vcpu_permit(struct kvm_vcpu *vcpu,
		      const struct kvmi_violation *violation);

#endif /* __KVM_INTROSPECTION_H */
