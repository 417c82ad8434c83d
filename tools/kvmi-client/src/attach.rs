// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Hooking a running VM through `/dev/kvmi`.

use std::{
    io,
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use kvmi_abi::{dev, dev::VmStatus};
use rustix::{
    io::Errno,
    process::{pidfd_getfd, pidfd_open, Pid, PidfdFlags, PidfdGetfdFlags},
};

use crate::{
    access::Access,
    attach_error::AttachError,
    connection::Connection,
    device::Device,
    discover::{self, Vmm},
    Uuid,
};

/// One VM of a running process.
///
/// A duplicate of the VM's file descriptor would keep the VM alive after its VMM has ended, so
/// each operation takes one for itself and closes it when done.
#[derive(Debug)]
pub struct Target {
    pid: i32,
    pidfd: OwnedFd,
    vm_fd: RawFd,
    uuid: Uuid,
}

impl Target {
    /// Chooses the VM of `vmm` with the file descriptor `vm_fd`; without that, the process must
    /// have one only.
    pub fn new(vmm: &Vmm, vm_fd: Option<RawFd>) -> Result<Self, AttachError> {
        let vm_fd = match (vm_fd, vmm.vm_fds.as_slice()) {
            (Some(fd), fds) if fds.contains(&fd) => fd,
            (None, [fd]) => *fd,
            (Some(_), _) | (None, []) => return Err(AttachError::NoVm(vmm.pid)),
            (None, fds) => {
                return Err(AttachError::SeveralVms {
                    pid: vmm.pid,
                    fds: fds.to_vec(),
                })
            }
        };
        let pid = Some(vmm.pid).filter(|pid| *pid > 0).and_then(Pid::from_raw);
        let pid = pid.ok_or(AttachError::NoProcess(vmm.pid))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| match errno {
            Errno::SRCH => AttachError::Gone,
            _ => AttachError::system("open the process", errno),
        })?;
        // From here on the pid cannot be that of another process unnoticed; was it before?
        if discover::start_ticks(vmm.pid)? != vmm.start_ticks {
            return Err(AttachError::Gone);
        }
        Ok(Self {
            pid: vmm.pid,
            pidfd,
            vm_fd,
            uuid: vmm.command_line.uuid.unwrap_or_default(),
        })
    }

    /// The process that the VM belongs to.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Number of the VM's file descriptor in that process.
    pub fn vm_fd(&self) -> RawFd {
        self.vm_fd
    }

    /// A file descriptor that becomes readable when the process ends.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Duplicates the file descriptor of the VM. Whoever keeps it keeps the VM alive.
    pub fn duplicate_vm_fd(&self) -> Result<OwnedFd, AttachError> {
        let fd = pidfd_getfd(&self.pidfd, self.vm_fd, PidfdGetfdFlags::empty());
        let fd = fd.map_err(|errno| match errno {
            Errno::SRCH | Errno::BADF => AttachError::Gone,
            _ => AttachError::system("take a file descriptor from the process", errno),
        })?;
        // The process may have closed it and have got the number again for something else.
        if !discover::is_own_vm_fd(fd.as_raw_fd()) {
            return Err(AttachError::Gone);
        }
        Ok(fd)
    }

    /// Describes the VM, whoever has it hooked.
    pub fn status(&self, device: &Device) -> Result<VmStatus, AttachError> {
        device
            .vm_status(self.duplicate_vm_fd()?)
            .map_err(|error| AttachError::system("ask for the state of the VM", error))
    }

    /// Lists where the VM has memory: guest physical addresses, in order.
    pub fn memory(&self, device: &Device) -> Result<Vec<Range<u64>>, AttachError> {
        let vm = self.duplicate_vm_fd()?;
        let mut slots: Vec<Range<u64>> = Vec::new();
        loop {
            let from = slots.last().map_or(0, |slot| slot.end);
            let next = device.next_memory(&vm, from);
            match next.map_err(|error| AttachError::system("ask for the VM's memory", error))? {
                // A slot below what was asked for would make this endless.
                Some(slot) if slot.end > from => slots.push(slot.start.max(from)..slot.end),
                _ => return Ok(slots),
            }
        }
    }

    /// Lists the pages that are restricted, whoever has the VM hooked: guest physical addresses, in
    /// order, and what the guest may do there.
    pub fn restricted(&self, device: &Device) -> Result<Vec<(Range<u64>, Access)>, AttachError> {
        let vm = self.duplicate_vm_fd()?;
        let mut runs: Vec<(Range<u64>, Access)> = Vec::new();
        loop {
            let from = runs.last().map_or(0, |(run, _)| run.end);
            let next = device.next_restricted(&vm, from);
            let next = next.map_err(|error| AttachError::system("ask for restricted pages", error));
            match (next?, runs.last_mut()) {
                // Pages that are restricted alike need not come together.
                (Some((pages, access)), Some((run, same)))
                    if pages.start == run.end && access == *same && pages.end > from =>
                {
                    run.end = pages.end;
                }
                // Pages below what was asked for would make this endless.
                (Some((pages, access)), _) if pages.end > from => runs.push((pages, access)),
                _ => return Ok(runs),
            }
        }
    }

    /// Makes the VM an introspector, or ends that: see [`Device::set_introspector`].
    pub fn set_introspector(&self, device: &Device, enable: bool) -> Result<(), AttachError> {
        let what = "change whether the VM is an introspector";
        let vm = self.duplicate_vm_fd()?;
        device
            .set_introspector(&vm, enable)
            .map_err(|error| refusal(device, &vm, what, error))
    }

    /// Hooks the VM to the other end of `socket`, which stays the caller's.
    pub fn attach(&self, device: Device, socket: impl AsFd) -> Result<Attachment, AttachError> {
        let vm = self.duplicate_vm_fd()?;
        match device.attach(&vm, socket, self.uuid) {
            Ok(()) => Ok(Attachment { device }),
            Err(error) => Err(refusal(&device, &vm, "hook the VM", error)),
        }
    }
}

/// Why a VM cannot be what it was to become.
fn refusal(device: &Device, vm: &OwnedFd, what: &'static str, error: io::Error) -> AttachError {
    match Errno::from_io_error(&error) {
        Some(Errno::EXIST) => AttachError::AlreadyHooked {
            by: hooked_by(device, vm),
        },
        Some(Errno::OPNOTSUPP) => AttachError::Unsupported,
        Some(Errno::SRCH) => AttachError::Gone,
        _ => AttachError::system(what, error),
    }
}

fn hooked_by(device: &Device, vm: &OwnedFd) -> Option<i32> {
    let status = device.vm_status(vm).ok()?;
    let valid = status.flags & dev::STATUS_HOOKED != 0 && status.hooked_by > 0;
    valid.then_some(status.hooked_by)
}

/// A hooked VM; dropping it unhooks.
#[derive(Debug)]
pub struct Attachment {
    device: Device,
}

impl Attachment {
    /// Hooks the only VM of process `pid`, allows everything, and connects to it.
    pub fn connect(pid: i32) -> Result<(Self, Connection<UnixStream>), AttachError> {
        Self::connect_to(
            &Target::new(&discover::process(pid)?, None)?,
            Device::open()?,
        )
    }

    /// Hooks a VM, allows everything, and connects to it.
    pub fn connect_to(
        target: &Target,
        device: Device,
    ) -> Result<(Self, Connection<UnixStream>), AttachError> {
        let (attachment, socket) = Self::socket_to(target, device)?;
        Ok((attachment, Connection::new(socket)))
    }

    /// As [`Self::connect_to`], for those who make the connection of the socket themselves.
    pub fn socket_to(target: &Target, device: Device) -> Result<(Self, UnixStream), AttachError> {
        let (ours, hosts) =
            UnixStream::pair().map_err(|error| AttachError::system("make a socket", error))?;
        device.allow_all_commands()?;
        device.allow_all_events()?;
        Ok((target.attach(device, hosts)?, ours))
    }

    /// Tells the tool that the VM is about to be unhooked; gives `false` if it cannot be told, or
    /// does not want to be. If told, it should hang up soon.
    pub fn pre_unhook(&self) -> Result<bool, AttachError> {
        match self.device.pre_unhook() {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(AttachError::system("tell the tool of the end", error)),
        }
    }

    /// Unhooks the VM and waits until that is done. Dropping does the same but tells no error.
    pub fn unhook(self) -> Result<(), AttachError> {
        let done = self.device.unhook();
        done.map_err(|error| AttachError::system("unhook the VM", error))
    }

    /// The file that hooks the VM, for what this type has no method for.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
