// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A file belongs to the process that has opened it, whoever else gets hold of it.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    process::{exit, Command, Stdio},
};

use kvmi_abi::mem::MEM_MAP;
use rustix::{
    io::{fcntl_getfd, fcntl_setfd, FdFlags},
    mm::MapFlags,
    net::{
        recvmsg, sendmsg, socketpair, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage,
        RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    },
};

use crate::{
    arguments::{expect_refused, request},
    counters::counter,
    harness::{test, Options, Test},
    memory::{Memory, RW},
    sys::{self, device, fork, in_child, ioctl, map, unmap, unmap_many, Errno},
};

const AREA: &str = "ownership";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(a_child_is_not_the_owner),
    test!(who_is_given_a_file_is_not_the_owner),
    test!(exec_makes_another_process_of_it),
    test!(a_file_outlives_its_process),
    test!(files_of_one_process_share_its_record),
    test!(a_thread_is_the_owner_too),
];

/// Hidden option: be the program that a test executes.
pub const ROLE: &str = "--role";

/// Is a helper, of which the argument is a descriptor of the device that another one has opened.
pub fn be(role: &str) {
    let fd: i32 = role.parse().expect("a descriptor");
    // SAFETY: whoever executes this program keeps the descriptor open for it.
    let file = unsafe { File::from_raw_fd(fd) };
    expect_foreign(&file);
    // What was mapped is gone with the memory of the program before.
    assert_eq!(counter("areas"), 0);
    exit(0);
}

/// The file is another process'.
#[track_caller]
fn expect_foreign(file: &File) {
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    assert_eq!(map(file, &request(0, own.address(0))), Err(Errno::INVAL));
    assert_eq!(unmap(file, own.address(0)), Err(Errno::INVAL));
    assert_eq!(unmap_many(file, own.address(0), 1), Err(Errno::INVAL));
    assert_eq!(ioctl(file, MEM_MAP, 0), Err(Errno::INVAL));
    assert_eq!(ioctl(file, 0, 0), Err(Errno::NOTTY));
    let area = Memory::of_file(file, 1, RW, MapFlags::SHARED, 0);
    assert_eq!(area.err(), Some(Errno::INVAL));
}

fn a_child_is_not_the_owner(options: &Options) {
    let device = device();
    let _area = Memory::of_device(&device, 1);
    in_child(|| {
        expect_foreign(&device);
        // But may have one of its own.
        let own = sys::device();
        let area = Memory::of_device(&own, 1);
        expect_refused(map(&own, &request(0, area.address(0))), options);
    });
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    expect_refused(map(&device, &request(0, own.address(0))), options);
}

fn send(socket: &OwnedFd, file: &File) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(
        socket,
        &[IoSlice::new(b"f")],
        &mut control,
        SendFlags::empty(),
    )
    .expect("a descriptor can be sent");
}

fn receive(socket: &OwnedFd) -> File {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::empty(),
    )
    .expect("a descriptor can be received");
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    File::from(fd.expect("there is a descriptor"))
}

fn sockets() -> (OwnedFd, OwnedFd) {
    socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::empty(),
        None,
    )
    .expect("sockets can be made")
}

fn who_is_given_a_file_is_not_the_owner(_: &Options) {
    let (ours, theirs) = sockets();
    // The child opens it, and goes before the file does.
    let child = fork(|| {
        let device = device();
        let area = Memory::of_device(&device, 3);
        area.write(0, 1);
        send(&theirs, &device);
    });
    let file = receive(&ours);
    let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
    expect_foreign(&file);
    // The file keeps nothing of the memory of its process.
    assert_eq!((counter("areas"), counter("area_pages")), (0, 0));
    assert_eq!((counter("files"), counter("processes")), (1, 1));
    drop(file);
    assert_eq!((counter("files"), counter("processes")), (0, 0));
}

fn exec_makes_another_process_of_it(_: &Options) {
    in_child(|| {
        let device = device();
        let _area = Memory::of_device(&device, 2);
        keep_open(&device);
        let fd = device.as_raw_fd().to_string();
        let error = std::os::unix::process::CommandExt::exec(
            Command::new("/proc/self/exe")
                .args([ROLE, &fd])
                .env("KVMMEM_TEST", "1")
                .stdin(Stdio::null()),
        );
        panic!("{error}");
    });
}

/// Has the file survive exec().
fn keep_open(file: &File) {
    let flags = fcntl_getfd(file).expect("a descriptor has flags");
    fcntl_setfd(file, flags - FdFlags::CLOEXEC).expect("they can be changed");
}

fn a_file_outlives_its_process(options: &Options) {
    // Address spaces come and go at the same places in memory: no new one is taken for an old one.
    for _ in 0..options.rounds.min(50) {
        let (ours, theirs) = sockets();
        let child = fork(|| send(&theirs, &device()));
        let file = receive(&ours);
        let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
        in_child(|| expect_foreign(&file));
    }
}

fn files_of_one_process_share_its_record(options: &Options) {
    let files = [device(), device(), device()];
    assert_eq!((counter("files"), counter("processes")), (3, 1));
    let own = Memory::anonymous(1, RW, MapFlags::PRIVATE);
    for file in &files {
        expect_refused(map(file, &request(0, own.address(0))), options);
    }
    let [first, rest @ ..] = files;
    drop(first);
    assert_eq!((counter("files"), counter("processes")), (2, 1));
    drop(rest);
    assert_eq!((counter("files"), counter("processes")), (0, 0));
}

fn a_thread_is_the_owner_too(options: &Options) {
    let device = device();
    let area = Memory::of_device(&device, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| expect_refused(map(&device, &request(0, area.address(0))), options));
    });
}
