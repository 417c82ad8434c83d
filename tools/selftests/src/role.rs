// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Helper processes of the tests: tools and VMMs that can be killed.
//!
//! A helper is this program, started anew; what it is told besides its arguments comes in through
//! its standard input.

use std::{
    fs::File,
    io::{stdin, stdout, BufRead, BufReader, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    panic,
    process::{self, Child, ChildStdin, ChildStdout, Command, Stdio},
};

use kvmi_abi::Command::{GetVersion, VmGetInfo, VmReadPhysical, VmWritePhysical};
use rustix::{
    process::{pidfd_getfd, pidfd_open, Pid, PidfdFlags, PidfdGetfdFlags},
    thread::{set_thread_res_uid, Uid},
};
use zerocopy::IntoBytes as _;

use crate::{
    mapping_servants,
    memory::Memory,
    sys,
    tool::{range, write_payload, Tool},
    vm::{Guest, TestVm, MEMORY, PAGE, SCRATCH},
};

/// Hidden option: be a helper process.
pub const ROLE: &str = "--role";

/// Where a [`Vmm`]'s memory is in its process.
pub const VMM_MEMORY: usize = 0x10_0000_0000;

/// What the scratch memory of a [`Vmm`] is filled with.
pub const VMM_PATTERN: u8 = 0xa5;

/// A user who is not root.
pub const NOBODY: u32 = 65534;

const FLOOD: &str = "flood";
const VMM: &str = "vmm";
const ATTACHER: &str = "attacher";

/// Is the helper that the arguments describe, until killed or told to end.
pub fn be(args: &[String]) {
    // What is wrong shall be told in the test's report, not to the test.
    panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        process::exit(1)
    }));
    let number = |nth: usize| -> i32 { args[nth].parse().expect("a number") };
    match args[0].as_str() {
        FLOOD => flood(stdin_tool()),
        VMM => be_vmm(number(1) as u32, number(2) as u32),
        ATTACHER => be_attacher(number(1), number(2)),
        mapping_servants::MAPPER => mapping_servants::be_mapper(number(1), number(2)),
        mapping_servants::INTROSPECTOR => mapping_servants::be_introspector(),
        role => panic!("no role {role}"),
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(ROLE).args(args);
    if let Ok(report) = stdout().as_fd().try_clone_to_owned() {
        command.stderr(report);
    }
    command
}

fn stdin_tool() -> Tool {
    // SAFETY: a helper with the role of a tool gets a socket as standard input, and nothing else
    // in the process uses it.
    Tool::on(UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) }))
}

/// Gives commands without a pause, until the connection is closed.
pub fn flood(mut tool: Tool) {
    loop {
        for page in 0..8 {
            let gpa = SCRATCH + page * PAGE as u64;
            let sent = tool
                .try_send(VmReadPhysical.id(), range(gpa, PAGE as u16).as_bytes())
                .and(tool.try_send(VmWritePhysical.id(), &write_payload(gpa, &[1; 512])))
                .and(tool.try_send(VmGetInfo.id(), &[]))
                .and(tool.try_send(GetVersion.id(), &[]));
            if sent.is_err() {
                return;
            }
            for _ in 0..4 {
                if tool.receive().is_none() {
                    return;
                }
            }
        }
    }
}

/// A process that is killed when this is dropped.
pub struct Helper(Child);

impl Helper {
    /// Kills the process and waits until it is gone.
    pub fn kill(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        Pid::from_child(&self.0).as_raw_nonzero().get()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts a process that floods a connection as its tool. The tool's end is its alone.
#[track_caller]
pub fn start_flood(tool: Tool) -> (Helper, Option<OwnedFd>) {
    let (stream, vmm_end) = tool.into_ends();
    let child = command(&[FLOOD]).stdin(OwnedFd::from(stream)).spawn();
    (Helper(child.expect("a process can be started")), vmm_end)
}

/// Reads the line in which a helper says that it is ready; returns it, and what comes behind it.
#[track_caller]
fn first_line(child: &mut Child) -> (String, BufReader<ChildStdout>) {
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().expect("its output is a pipe"));
    let read = output.read_line(&mut line);
    read.expect("its output can be read");
    assert!(line.ends_with('\n'), "a helper has failed: {line}");
    (line, output)
}

/// A VM of another process.
pub struct Vmm {
    /// The process.
    pub process: Helper,
    /// The VM, as long as it is kept open here.
    pub vm: Option<OwnedFd>,
    // Its end tells the process to end, should this one die.
    _stdin: Option<ChildStdin>,
}

impl Vmm {
    /// Starts a process with a VM with this many counting vCPUs, owned by this user.
    #[track_caller]
    pub fn start(vcpus: u32, uid: u32) -> Self {
        let mut child = command(&[VMM, &vcpus.to_string(), &uid.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process can be started");
        let (line, _) = first_line(&mut child);
        let fd = line.trim().parse().expect("the number of a descriptor");
        let vm = take_fd(Pid::from_child(&child), fd);
        Self {
            _stdin: child.stdin.take(),
            process: Helper(child),
            vm: Some(vm),
        }
    }

    /// The number of the VM's descriptor in this process.
    #[track_caller]
    pub fn vm_fd(&self) -> RawFd {
        self.vm.as_ref().expect("it is open").as_raw_fd()
    }
}

/// Takes a copy of another process's descriptor.
#[track_caller]
fn take_fd(pid: Pid, fd: RawFd) -> OwnedFd {
    let process = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd_open");
    pidfd_getfd(process.as_fd(), fd, PidfdGetfdFlags::empty()).expect("pidfd_getfd")
}

fn be_vmm(vcpus: u32, uid: u32) {
    let mut vm = TestVm::with_memory(Memory::at(VMM_MEMORY, MEMORY), 0);
    let scratch = MEMORY - SCRATCH as usize;
    vm.memory.fill(SCRATCH, scratch, VMM_PATTERN);
    for _ in 0..vcpus {
        vm.start(Guest::Count);
    }
    if uid != 0 {
        let uid = Uid::from_raw(uid);
        set_thread_res_uid(uid, uid, uid).expect("root can become anybody");
    }
    println!("{}", vm.raw_fd());
    // Until the other end is closed.
    let _ = std::io::stdin().read(&mut [0]);
}

/// Starts a process that attaches a VM of this one to a tool of its own, and floods it.
#[track_caller]
pub fn start_attacher(vm_fd: RawFd) -> Helper {
    let pid = std::process::id().to_string();
    let mut child = command(&[ATTACHER, &pid, &vm_fd.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a process can be started");
    first_line(&mut child);
    Helper(child)
}

fn be_attacher(pid: i32, vm_fd: RawFd) {
    let (_dev, tool) = attach(pid, vm_fd);
    println!("attached");
    flood(tool);
}

/// Attaches another process's VM to a tool that may do everything, as long as the file is open.
pub fn attach(pid: i32, vm_fd: RawFd) -> (File, Tool) {
    let vm = take_fd(Pid::from_raw(pid).expect("a process"), vm_fd);
    let (dev, tool) = (sys::open_dev(), Tool::new());
    sys::attach(&dev, vm.as_raw_fd(), tool.vmm_fd()).expect("the VM can be attached");
    sys::allow_all(&dev);
    (dev, tool)
}

/// A process that does as it is told, order by order.
pub struct Servant {
    /// The process.
    pub process: Helper,
    /// How it is told.
    pub orders: Orders,
}

/// The way to and from a [`Servant`].
pub struct Orders {
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Servant {
    /// Starts a helper that calls [`serve`] in the end.
    #[track_caller]
    pub fn start(role: &[&str]) -> Self {
        let mut child = command(role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process can be started");
        let (_, from) = first_line(&mut child);
        let to = child.stdin.take().expect("its input is a pipe");
        Self {
            process: Helper(child),
            orders: Orders { to, from },
        }
    }
}

impl Orders {
    /// Gives an order and waits for the answer; `None` if the process has ended.
    pub fn give(&mut self, order: &str) -> Option<String> {
        writeln!(self.to, "{order}").ok()?;
        let mut answer = String::new();
        self.from.read_line(&mut answer).ok()?;
        answer.strip_suffix('\n').map(str::to_owned)
    }
}

/// Says that it is ready, and answers orders, of words.
pub fn serve(mut answer: impl FnMut(&[&str]) -> String) {
    println!("ready");
    for order in stdin().lines().map_while(Result::ok) {
        let words: Vec<_> = order.split(' ').collect();
        println!("{}", answer(&words));
    }
}
