// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The system calls that the tests are about, and some that they need.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
};

use kvmi_abi::{
    dev::{self, Attach, Introspector, VmMemory, VmStatus},
    ioctl::{self, EventTimeout, Feature, Hook},
};
use rustix::{
    ioctl::{ioctl, IntegerSetter, NoArg, Opcode, Setter, Updater},
    mm::{userfaultfd, UserfaultfdFlags},
    system::delete_module,
    thread::{self, CapabilitySet},
};

pub use rustix::io::Errno;

/// An ioctl that takes a `T`.
fn set<const NR: Opcode, T>(fd: impl AsFd, value: T) -> Result<(), Errno> {
    // SAFETY: the callers below pair each number with the structure that it is defined with, and
    // the kernel only reads it.
    unsafe { ioctl(fd, Setter::<NR, T>::new(value)) }
}

/// An ioctl that takes a `T` and fills it in.
fn update<const NR: Opcode, T>(fd: impl AsFd, value: &mut T) -> Result<(), Errno> {
    // SAFETY: as for `set`; every bit pattern is a value of the structures used.
    unsafe { ioctl(fd, Updater::<NR, T>::new(value)) }
}

/// An ioctl without argument, or one that does not exist.
pub fn plain<const NR: Opcode>(fd: impl AsFd) -> Result<(), Errno> {
    // SAFETY: the numbers used either take no argument or are unknown to the files they are used
    // on.
    unsafe { ioctl(fd, NoArg::<NR>::new()) }
}

/// An ioctl whose argument cannot be read.
pub fn unreadable<const NR: Opcode>(fd: impl AsFd) -> Result<(), Errno> {
    // SAFETY: nothing is mapped at address 0, so that the kernel cannot touch any memory.
    unsafe { ioctl(fd, IntegerSetter::<NR>::new_usize(0)) }
}

/// HOOK with any argument.
pub fn hook_with(vm: impl AsFd, hook: Hook) -> Result<(), Errno> {
    set::<{ ioctl::HOOK }, _>(vm, hook)
}

/// HOOK with this socket, which may be the number of anything.
pub fn hook(vm: impl AsFd, fd: RawFd) -> Result<(), Errno> {
    hook_with(
        vm,
        Hook {
            fd,
            ..Default::default()
        },
    )
}

/// UNHOOK, on a VM or on `/dev/kvmi`.
pub fn unhook(fd: impl AsFd) -> Result<(), Errno> {
    plain::<{ ioctl::UNHOOK }>(fd)
}

/// PREUNHOOK, on a VM or on `/dev/kvmi`.
pub fn preunhook(fd: impl AsFd) -> Result<(), Errno> {
    plain::<{ ioctl::PREUNHOOK }>(fd)
}

/// COMMAND, on a VM or on `/dev/kvmi`.
pub fn command(fd: impl AsFd, allow: u32, id: i32) -> Result<(), Errno> {
    set::<{ ioctl::COMMAND }, _>(fd, Feature { allow, id })
}

/// EVENT, on a VM or on `/dev/kvmi`.
pub fn event(fd: impl AsFd, allow: u32, id: i32) -> Result<(), Errno> {
    set::<{ ioctl::EVENT }, _>(fd, Feature { allow, id })
}

/// The VM's EVENT_TIMEOUT.
pub fn vm_event_timeout(vm: impl AsFd, timeout: EventTimeout) -> Result<(), Errno> {
    set::<{ ioctl::EVENT_TIMEOUT }, _>(vm, timeout)
}

/// Allows every command and every event.
#[track_caller]
pub fn allow_all(fd: impl AsFd) {
    command(&fd, 1, -1).expect("all commands can be allowed");
    event(&fd, 1, -1).expect("all events can be allowed");
}

/// Opens `/dev/kvmi`.
#[track_caller]
pub fn open_dev() -> File {
    let open = File::options().read(true).write(true).open("/dev/kvmi");
    open.expect("/dev/kvmi can be opened")
}

/// INTROSPECTOR
pub fn introspector(dev: impl AsFd, vm_fd: RawFd, enable: u32) -> Result<(), Errno> {
    set::<{ dev::INTROSPECTOR }, _>(dev, Introspector { vm_fd, enable })
}

/// ATTACH with any argument.
pub fn attach_with(dev: impl AsFd, attach: Attach) -> Result<(), Errno> {
    set::<{ dev::ATTACH }, _>(dev, attach)
}

/// ATTACH of a VM to a socket.
pub fn attach(dev: impl AsFd, vm_fd: RawFd, socket_fd: RawFd) -> Result<(), Errno> {
    attach_with(
        dev,
        Attach {
            vm_fd,
            socket_fd,
            ..Default::default()
        },
    )
}

/// EVENT_TIMEOUT with any argument.
pub fn event_timeout_with(dev: impl AsFd, timeout: EventTimeout) -> Result<(), Errno> {
    set::<{ dev::EVENT_TIMEOUT }, _>(dev, timeout)
}

/// EVENT_TIMEOUT of so many milliseconds.
#[track_caller]
pub fn event_timeout(dev: impl AsFd, ms: u32) {
    let timeout = EventTimeout {
        ms,
        ..Default::default()
    };
    event_timeout_with(dev, timeout).expect("EVENT_TIMEOUT succeeds");
}

/// VM_STATUS of the VM with this descriptor.
pub fn vm_status(dev: impl AsFd, vm_fd: RawFd) -> Result<VmStatus, Errno> {
    let mut status = VmStatus {
        vm_fd,
        ..Default::default()
    };
    update::<{ dev::VM_STATUS }, _>(dev, &mut status)?;
    Ok(status)
}

/// VM_MEMORY with any argument.
pub fn vm_memory_with(dev: impl AsFd, mut memory: VmMemory) -> Result<VmMemory, Errno> {
    // SAFETY: VM_MEMORY reads and writes a `VmMemory`, for which any bytes will do.
    unsafe {
        ioctl(
            dev,
            Updater::<{ dev::VM_MEMORY }, VmMemory>::new(&mut memory),
        )
    }?;
    Ok(memory)
}

/// The bytes of a structure that KVM has filled in.
///
/// # Safety
///
/// `T` has no implicit padding.
pub unsafe fn bytes_of<T>(value: &T) -> &[u8] {
    // SAFETY: the bytes are those of `value`, and all of them have a value.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Tries to unload the module without waiting.
pub fn try_unload() -> Result<(), Errno> {
    const O_NONBLOCK: i32 = 0o4000;
    delete_module(c"kvmi_host", O_NONBLOCK)
}

/// Runs `action` in a thread that lacks `capability`.
pub fn without_capability<T: Send>(
    capability: CapabilitySet,
    action: impl FnOnce() -> T + Send,
) -> T {
    let limited = || {
        let mut sets = thread::capabilities(None).expect("capabilities can be read");
        sets.effective.remove(capability);
        thread::set_capabilities(None, sets).expect("a capability can be dropped");
        action()
    };
    std::thread::scope(|scope| scope.spawn(limited).join()).expect("the thread does not panic")
}

/// Memory of which every first access waits, until this is dropped.
pub struct BlockedMemory {
    uffd: OwnedFd,
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

impl BlockedMemory {
    /// Blocks memory of this process that has not been touched yet.
    pub fn new(start: usize, len: usize) -> Result<Self, Errno> {
        const UFFDIO: u32 = 0xaa;
        const UFFD_API: u64 = 0xaa;
        const MODE_MISSING: u64 = 1;
        const API: Opcode = ioctl::iowr::<UffdioApi>(UFFDIO, 0x3f);
        const REGISTER: Opcode = ioctl::iowr::<UffdioRegister>(UFFDIO, 0x00);

        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: whoever touches the memory only waits until the descriptor is closed.
        let uffd = unsafe { userfaultfd(flags) }?;
        let mut api = UffdioApi {
            api: UFFD_API,
            features: 0,
            ioctls: 0,
        };
        update::<API, _>(&uffd, &mut api)?;
        let mut register = UffdioRegister {
            start: start as u64,
            len: len as u64,
            mode: MODE_MISSING,
            ioctls: 0,
        };
        update::<REGISTER, _>(&uffd, &mut register)?;
        Ok(Self { uffd })
    }
}

impl AsFd for BlockedMemory {
    /// Can be read when somebody waits for the memory.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}
