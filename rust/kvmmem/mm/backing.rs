// SPDX-License-Identifier: GPL-2.0

//! Mappings of which the pages are ours, and that end as a whole.
//!
//! Each gets an anonymous file of its own in the place of the device's. Whatever ends the mapping
//! (munmap, exec, exit), it puts that file; the kernel releases it when the task returns to user
//! space, at the latest, and then no lock is held. A `close` callback of the mapping would run with that
//! of the address space held, under which the host must not be called.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h),
//! [`include/linux/anon_inodes.h`](srctree/include/linux/anon_inodes.h)

use kernel::{
    bindings,
    error::from_err_ptr,
    ffi::{
        c_int,
        c_ulong, //
    },
    mm::virt::{
        flags,
        VmaNew,
        VmaRef, //
    },
    page::{
        Page,
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::Arc,
    types::ForeignOwnable, //
};

use crate::host;

/// What is behind a mapping.
pub(crate) trait Backing: Send + Sync {
    /// The page at `index` of the mapping, the same one each time. Called with the lock of the
    /// address space or of the mapping held.
    fn page(&self, index: usize) -> Option<&Page>;
}

/// What the file of a mapping has as private data: a thin pointer.
type Private = KBox<Arc<dyn Backing>>;

/// For the tables of callbacks below.
#[repr(transparent)]
struct Table<T>(T);

// SAFETY: The tables are never changed, and what they point to may be used by any task.
unsafe impl<T> Sync for Table<T> {}

static FILE_OPS: Table<bindings::file_operations> = Table(bindings::file_operations {
    owner: crate::THIS_MODULE.as_ptr(),
    release: Some(release),
    ..pin_init::zeroed()
});

static VM_OPS: Table<bindings::vm_operations_struct> = Table(bindings::vm_operations_struct {
    fault: Some(fault),
    may_split: Some(may_split),
    mremap: Some(mremap),
    ..pin_init::zeroed()
});

/// Lets `backing` have the pages of the mapping `vma`; they are entered as they are touched.
///
/// It is dropped when the mapping is gone, on a task that holds no lock; at once if this fails.
///
/// The mapping can be neither split, moved, resized nor inherited, and is not dumped. The page
/// tables have frame numbers (`VM_PFNMAP`), not references: the pages are for the CPU only. I/O
/// that the kernel does on behalf of a program cannot get hold of them, since devices would get at
/// what this VM has there, not at what the host has replaced it by.
///
/// Fails with `EINVAL` if the mapping is not one for that: see [`expect_suitable`].
pub(crate) fn back(vma: &VmaNew, backing: Arc<dyn Backing>) -> Result {
    expect_suitable(vma)?;
    let private = Private::new(backing, GFP_KERNEL)?.into_foreign();
    // SAFETY: The name and the callbacks are static.
    let file = unsafe {
        kvmmem_bindings::anon_inode_getfile(
            c"[kvmmem]".as_char_ptr(),
            &raw const FILE_OPS.0,
            private,
            bindings::O_RDWR as c_int, // CAST: It is 2.
        )
    };
    let file = from_err_ptr(file).inspect_err(|_| {
        // SAFETY: This is what `into_foreign` has returned, and nobody else has it.
        drop(unsafe { Private::from_foreign(private) });
    })?;
    // SAFETY: The mapping is being set up, and has the file of the device; `file` is valid.
    unsafe { bindings::vma_set_file(vma.as_ptr(), file) };
    // SAFETY: The mapping has a reference of its own; this one is ours.
    unsafe { bindings::fput(file) };
    // SAFETY: The mapping is being set up, so that nobody else looks at it.
    unsafe { (*vma.as_ptr()).vm_ops = &raw const VM_OPS.0 };
    set_pfnmap(vma);
    vma.set_io();
    vma.set_dontcopy();
    vma.set_dontexpand();
    vma.set_dontdump();
    Ok(())
}

/// Fails with `EINVAL` unless `vma` is a shared mapping for data, from the device's begin on.
pub(crate) fn expect_suitable(vma: &VmaNew) -> Result {
    vma.try_clear_mayexec()?;
    // Whether pages would be copied when they are written to. Not by `MAYSHARE`: the kernel's
    // bindings have the value of `VM_MAYEXEC` for it (bindings_helper.h of 7.2). A shared
    // mapping of a file that cannot be written to has neither of the two.
    let is_private = vma.flags() & (flags::SHARED | flags::MAYWRITE) == flags::MAYWRITE;
    // SAFETY: The mapping is being set up, so that nobody changes it.
    let offset = unsafe { (*vma.as_ptr()).vm_pgoff };
    (!is_private && offset == 0).then_some(()).ok_or(EINVAL)
}

/// Lets the mapping have frame numbers. It must be a shared one.
fn set_pfnmap(vma: &VmaNew) {
    // SAFETY: The mapping is being set up, so that nobody else looks at its flags.
    unsafe { (*vma.as_ptr()).__bindgen_anon_2.vm_flags |= flags::PFNMAP };
}

/// # Safety
///
/// For `file_operations::release` of a file made by [`back`].
unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: The file is valid, and ours alone by now.
    let private = unsafe { (*file).private_data };
    // SAFETY: It comes from `into_foreign` in `back`, and the file is not used any more.
    drop(unsafe { Private::from_foreign(private) });
    0
}

/// # Safety
///
/// For `vm_operations_struct::fault` of a mapping made by [`back`].
unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: The description of the fault is valid during this call.
    let at = unsafe { (*vmf).__bindgen_anon_1 };
    // SAFETY: The mapping's lock, or that of its address space, is held during this call.
    let vma = unsafe { VmaRef::from_raw(at.vma) };
    // SAFETY: The mapping is valid as above, and holds a reference to its file.
    let file = unsafe { (*vma.as_ptr()).vm_file };
    // SAFETY: The file is valid as the mapping is.
    let private = unsafe { (*file).private_data };
    // SAFETY: It comes from `into_foreign` in `back`; it is taken back when there is no mapping any
    // more.
    let backing = unsafe { Private::borrow(private) };

    // The mapping begins where it was made: it is never moved or split.
    let index = at.address.wrapping_sub(vma.start()) / PAGE_SIZE;
    match backing.page(index) {
        Some(page) => enter(vma, at.address, page),
        None => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
    }
}

/// Enters `page` into the page table at `address` of a mapping made by [`back`].
fn enter(vma: &VmaRef, address: usize, page: &Page) -> bindings::vm_fault_t {
    let pfn = host::gpa(page) >> PAGE_SHIFT;
    // SAFETY: The mapping is valid and locked, shared, and has `VM_PFNMAP` only. Its pages exist
    // until its file is released, which comes after its page table entries.
    unsafe { bindings::vmf_insert_pfn(vma.as_ptr(), address, pfn as c_ulong) }
}

/// # Safety
///
/// None: for `vm_operations_struct::may_split`.
unsafe extern "C" fn may_split(_vma: *mut bindings::vm_area_struct, _addr: c_ulong) -> c_int {
    EINVAL.to_errno()
}

/// # Safety
///
/// None: for `vm_operations_struct::mremap`.
unsafe extern "C" fn mremap(_vma: *mut bindings::vm_area_struct) -> c_int {
    EINVAL.to_errno()
}
