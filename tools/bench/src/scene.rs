// SPDX-License-Identifier: GPL-2.0 OR MIT

//! VMs to be measured, hooked or not, and where their threads run.

use std::{fs, hint, os::unix::net::UnixStream, thread};

use anyhow::{bail, ensure, Context as _, Result};
use kvmi_client::{abi::ioctl::KVM_CAP_INTROSPECTION, device::Device, Access, Connection, Uuid};
use rustix::thread::{sched_setaffinity, CpuSet, Pid};
use tiny_vm::{Memory, Runner, Vm};

use crate::{
    figure::Setting,
    program::{self, Program},
};

/// Where the tool runs, and what serves it. Not CPU 0, which has the host's own work.
pub const TOOL_CPU: usize = 1;
/// Where vCPUs run that do not share a CPU with the tool.
pub const VCPU_CPU: usize = 2;

/// Lets the calling thread, and those that it starts, run on this CPU only.
pub fn pin(cpu: usize) -> Result<()> {
    pin_thread(None, cpu)
}

/// Lets a thread run on this CPU only.
pub fn pin_thread(thread: Option<Pid>, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(thread, &set).with_context(|| format!("cannot run on CPU {cpu}"))
}

/// Fails unless this is a host for `setting`.
pub fn check(setting: Setting) -> Result<()> {
    let vm = Vm::bare().context("no VM can be created")?;
    let loaded = vm.capability(KVM_CAP_INTROSPECTION) != 0;
    let wanted = matches!(setting, Setting::Loaded | Setting::Hooked);
    ensure!(
        loaded == wanted,
        "kvmi_host is {}loaded, which is not the setting '{}'",
        if loaded { "" } else { "not " },
        setting.title()
    );
    Ok(())
}

/// What a tool does that is not measured.
pub type Client<'a> = Connection<&'a UnixStream>;

/// A tool's connection to a hooked VM, as a plain socket.
pub struct Hook {
    /// The tool's end.
    pub tool: UnixStream,
    /// The VM is hooked until this is closed.
    _device: Device,
}

impl Hook {
    /// Hooks a VM and allows everything.
    pub fn new(vm: &Vm) -> Result<Self> {
        let (tool, vmm) = UnixStream::pair()?;
        let device = Device::open()?;
        device.allow_all_commands()?;
        device.allow_all_events()?;
        device.attach(vm, &vmm, Uuid::nil())?;
        pin_thread(Some(receiver()?), TOOL_CPU)?;
        Ok(Self {
            tool,
            _device: device,
        })
    }

    /// A client's view of the connection, for what is not measured.
    pub fn client(&self) -> Client<'_> {
        Connection::new(&self.tool)
    }

    /// Denies the guest to write to these pages.
    pub fn protect(&self, pages: impl IntoIterator<Item = u64>) -> Result<()> {
        let access = Access::R | Access::X;
        let pages = pages.into_iter().map(|gpa| (gpa, access));
        Ok(self.client().set_page_access(pages)?)
    }
}

/// The thread of the kernel that receives the tool's messages. No other VM is hooked.
fn receiver() -> Result<Pid> {
    for process in fs::read_dir("/proc")? {
        let path = process?.path();
        let comm = fs::read_to_string(path.join("comm")).unwrap_or_default();
        let number = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        if let (Some(pid), "kvmi-recv") = (number.and_then(Pid::from_raw), comm.trim()) {
            return Ok(pid);
        }
    }
    bail!("the thread that serves the tool is not there");
}

/// A hooked VM whose only vCPU a thread runs.
pub struct Scene {
    /// The connection to it.
    pub hook: Hook,
    memory: Memory,
    runner: Runner,
}

impl Scene {
    /// A VM whose vCPU does this, on this CPU.
    pub fn new(program: Program, cpu: usize) -> Result<Self> {
        let (vm, vcpu) = program.load()?;
        let runner = Runner::start(vcpu);
        pin_thread(Some(runner.tid()), cpu)?;
        let scene = Self {
            hook: Hook::new(&vm)?,
            memory: vm.memory,
            runner,
        };
        scene.wait_until_counted_from(0)?;
        Ok(scene)
    }

    /// How far the vCPU has counted.
    pub fn count(&self) -> u32 {
        program::count(&self.memory)
    }

    /// Waits until the vCPU has counted on from there.
    pub fn wait_until_counted_from(&self, before: u32) -> Result<()> {
        while self.count() == before {
            ensure!(!self.runner.has_ended(), "the vCPU has stopped");
            // First the others on this CPU, then the other CPUs if they are emulated in turns.
            thread::yield_now();
            hint::spin_loop();
        }
        Ok(())
    }
}
