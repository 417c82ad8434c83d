// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The device's ioctls and the few other system calls that the tests are about.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd as _},
    process::exit,
};

use kvmi_abi::mem::{
    MemMap, MemMapMany, MemUnmapMany, MEM_MAP, MEM_MAP_MANY, MEM_UNMAP, MEM_UNMAP_MANY,
};
use rustix::process::{waitpid, Pid, WaitOptions};

pub use rustix::io::Errno;

/// The device.
pub const DEVICE: &str = "/dev/kvmmem";

/// Opens the device for reading and writing.
pub fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

/// Opens the device; fails the test if it cannot be.
#[track_caller]
pub fn device() -> File {
    open().expect("the device can be opened")
}

/// Any ioctl; what it does to memory at `arg` is up to the caller.
pub fn ioctl(fd: impl AsFd, number: u32, arg: usize) -> Result<usize, Errno> {
    // SAFETY: the device only reads what its ioctls take; what they do to the memory that they are
    // about is what the tests are for.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), number.into(), arg) };
    usize::try_from(result).map_err(|_| {
        Errno::from_io_error(&io::Error::last_os_error()).expect("a system call sets errno")
    })
}

/// MEM_MAP.
pub fn map(fd: impl AsFd, request: &MemMap) -> Result<(), Errno> {
    ioctl(fd, MEM_MAP, std::ptr::from_ref(request).addr()).map(drop)
}

/// MEM_UNMAP.
pub fn unmap(fd: impl AsFd, gva: usize) -> Result<(), Errno> {
    ioctl(fd, MEM_UNMAP, gva).map(drop)
}

/// MEM_MAP_MANY.
pub fn map_many(fd: impl AsFd, request: &MemMapMany) -> Result<(), Errno> {
    ioctl(fd, MEM_MAP_MANY, std::ptr::from_ref(request).addr()).map(drop)
}

/// MEM_UNMAP_MANY.
pub fn unmap_many(fd: impl AsFd, gva: usize, count: u32) -> Result<usize, Errno> {
    let request = MemUnmapMany {
        gva: gva as u64,
        count,
        padding: 0,
    };
    ioctl(fd, MEM_UNMAP_MANY, std::ptr::from_ref(&request).addr())
}

/// Runs `action` in a child that fork() makes; fails the test if it panics, or dies.
#[track_caller]
pub fn in_child(action: impl FnOnce()) {
    let status = child_status(action);
    assert_eq!(status, 0, "exit status of the child");
}

/// Runs `action` in a child that fork() makes; returns its wait status.
#[track_caller]
pub fn child_status(action: impl FnOnce()) -> i32 {
    let pid = fork(action);
    let (_, status) = waitpid(Some(pid), WaitOptions::empty())
        .expect("a child can be waited for")
        .expect("it has ended");
    status.as_raw()
}

/// Makes a child that runs `action` and ends.
#[track_caller]
pub fn fork(action: impl FnOnce()) -> Pid {
    // SAFETY: the tests that fork have one thread.
    match unsafe { libc::fork() } {
        -1 => panic!("{}", io::Error::last_os_error()),
        0 => {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
            exit(i32::from(result.is_err()))
        }
        pid => Pid::from_raw(pid).expect("a pid is positive"),
    }
}

/// Tries to unload the module without waiting.
pub fn try_unload() -> Result<(), Errno> {
    rustix::system::delete_module(c"kvmmem", libc::O_NONBLOCK)
}
