// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `/dev/kvmi`: the ioctls, one function each.

use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    time::Duration,
};

use kvmi_abi::{
    dev::{self, Attach, Introspector, PageWalks, VmAccess, VmMemory, VmStatus},
    ioctl::{EventTimeout, Feature, COMMAND, EVENT, PREUNHOOK, UNHOOK},
    Command, Event,
};
use rustix::{
    io::Errno,
    ioctl::{ioctl, NoArg, Setter, Updater},
};

use crate::{access::Access, attach_error::AttachError, Uuid};

/// Where the module puts its device.
pub const PATH: &str = "/dev/kvmi";

/// Everything, in a change of an allow mask.
const ALL: Feature = Feature { allow: 1, id: -1 };

/// An open `/dev/kvmi`. It hooks at most one VM, until it is closed.
#[derive(Debug)]
pub struct Device(OwnedFd);

impl Device {
    /// Opens the device.
    pub fn open() -> Result<Self, AttachError> {
        match OpenOptions::new().read(true).write(true).open(PATH) {
            Ok(file) => Ok(Self::from_file(file)),
            Err(error) => Err(match Errno::from_io_error(&error) {
                Some(Errno::NOENT | Errno::NXIO | Errno::NODEV) => AttachError::NoModule,
                _ => AttachError::system("open /dev/kvmi", error),
            }),
        }
    }

    /// Takes over a file that the caller has opened, or has been given.
    pub fn from_file(file: File) -> Self {
        Self(file.into())
    }

    /// Hooks the VM behind `vm` to the other end of `socket`, neither of which it keeps.
    pub fn attach(&self, vm: impl AsFd, socket: impl AsFd, uuid: Uuid) -> io::Result<()> {
        let argument = Attach {
            vm_fd: vm.as_fd().as_raw_fd(),
            socket_fd: socket.as_fd().as_raw_fd(),
            flags: 0,
            padding: 0,
            uuid: uuid.into_bytes(),
        };
        // SAFETY: ATTACH reads an `Attach`, and nothing else, through its argument.
        let done = unsafe { ioctl(&self.0, Setter::<{ dev::ATTACH }, _>::new(argument)) };
        Ok(done?)
    }

    /// Describes the VM behind `vm`, whoever has it hooked.
    pub fn vm_status(&self, vm: impl AsFd) -> io::Result<VmStatus> {
        let mut status = VmStatus {
            vm_fd: vm.as_fd().as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: VM_STATUS reads and writes a `VmStatus`, for which any bytes will do, through
        // its argument, and nothing else.
        let done = unsafe {
            let request = Updater::<{ dev::VM_STATUS }, VmStatus>::new(&mut status);
            ioctl(&self.0, request)
        };
        done?;
        Ok(status)
    }

    /// Returns the guest physical addresses of the lowest memory slot of the VM behind `vm` that
    /// ends after `gpa`; nothing if there is none.
    pub fn next_memory(&self, vm: impl AsFd, gpa: u64) -> io::Result<Option<Range<u64>>> {
        let mut memory = VmMemory {
            vm_fd: vm.as_fd().as_raw_fd(),
            gpa,
            ..Default::default()
        };
        // SAFETY: VM_MEMORY reads and writes a `VmMemory`, for which any bytes will do, through
        // its argument, and nothing else.
        let done = unsafe {
            let request = Updater::<{ dev::VM_MEMORY }, VmMemory>::new(&mut memory);
            ioctl(&self.0, request)
        };
        match done {
            Ok(()) => Ok(Some(memory.gpa..memory.gpa.saturating_add(memory.size))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Returns the first pages of the VM behind `vm` from `gpa` on that are restricted, as guest
    /// physical addresses, and what the guest may do with them; nothing if there is none. The next
    /// ones may be restricted alike.
    pub fn next_restricted(
        &self,
        vm: impl AsFd,
        gpa: u64,
    ) -> io::Result<Option<(Range<u64>, Access)>> {
        let mut pages = VmAccess {
            vm_fd: vm.as_fd().as_raw_fd(),
            gpa,
            ..Default::default()
        };
        // SAFETY: VM_ACCESS reads and writes a `VmAccess`, for which any bytes will do, through its
        // argument, and nothing else.
        let done = unsafe {
            let request = Updater::<{ dev::VM_ACCESS }, VmAccess>::new(&mut pages);
            ioctl(&self.0, request)
        };
        match done {
            Ok(()) => {
                let access = u8::try_from(pages.access).ok().and_then(Access::from_bits);
                let access = access.ok_or(io::ErrorKind::InvalidData)?;
                Ok(Some((
                    pages.gpa..pages.gpa.saturating_add(pages.size),
                    access,
                )))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Says whether there shall be [`Pf`](crate::VcpuEventKind::Pf) events, too, when the CPU itself
    /// accesses a restricted page because it walks the guest's page tables; otherwise that is
    /// permitted. Concerns the VM that is hooked, or gets hooked next.
    pub fn report_page_walks(&self, report: bool) -> Result<(), AttachError> {
        let argument = PageWalks {
            report: report.into(),
            padding: 0,
        };
        // SAFETY: PAGE_WALKS reads a `PageWalks`, and nothing else, through its argument.
        let done = unsafe { ioctl(&self.0, Setter::<{ dev::PAGE_WALKS }, _>::new(argument)) };
        done.map_err(|errno| AttachError::system("change whether page walks are reported", errno))
    }

    /// Makes the VM behind `vm` an introspector, whose guest may map pages of VMs that are
    /// introspected if it has a [token](crate::Connection::map_token) for that; or ends that, and
    /// the mappings with it. It does not end with this file.
    pub fn set_introspector(&self, vm: impl AsFd, enable: bool) -> io::Result<()> {
        let argument = Introspector {
            vm_fd: vm.as_fd().as_raw_fd(),
            enable: enable.into(),
        };
        // SAFETY: INTROSPECTOR reads an `Introspector`, and nothing else, through its argument.
        let done = unsafe { ioctl(&self.0, Setter::<{ dev::INTROSPECTOR }, _>::new(argument)) };
        Ok(done?)
    }

    /// Allows the tool all commands: that of the VM which is hooked, or gets hooked next.
    ///
    /// A hooked VM starts with next to nothing allowed, and a tool may send commands as soon as it
    /// is connected: allow them before [`Self::attach`].
    pub fn allow_all_commands(&self) -> Result<(), AttachError> {
        self.change_commands(ALL)
    }

    /// Allows or disallows the tool a command; as for [`Self::allow_all_commands`].
    pub fn allow_command(&self, command: Command, allow: bool) -> Result<(), AttachError> {
        self.change_commands(feature(command.id(), allow))
    }

    /// Allows the tool all events; as for [`Self::allow_all_commands`].
    pub fn allow_all_events(&self) -> Result<(), AttachError> {
        self.change_events(ALL)
    }

    /// Allows or disallows the tool an event; as for [`Self::allow_all_commands`].
    pub fn allow_event(&self, event: Event, allow: bool) -> Result<(), AttachError> {
        self.change_events(feature(event.id(), allow))
    }

    fn change_commands(&self, feature: Feature) -> Result<(), AttachError> {
        // SAFETY: COMMAND reads a `Feature`, and nothing else, through its argument.
        let done = unsafe { ioctl(&self.0, Setter::<{ COMMAND }, _>::new(feature)) };
        done.map_err(|errno| AttachError::system("change the allowed commands", errno))
    }

    fn change_events(&self, feature: Feature) -> Result<(), AttachError> {
        // SAFETY: EVENT reads a `Feature`, and nothing else, through its argument.
        let done = unsafe { ioctl(&self.0, Setter::<{ EVENT }, _>::new(feature)) };
        done.map_err(|errno| AttachError::system("change the allowed events", errno))
    }

    /// Sets how long a vCPU waits for the reply to an event before the tool is disconnected; `None`
    /// is for ever. Concerns the VM that is hooked, or gets hooked next.
    pub fn set_event_timeout(&self, timeout: Option<Duration>) -> Result<(), AttachError> {
        let argument = EventTimeout {
            ms: timeout.map_or(0, milliseconds),
            padding: 0,
        };
        // SAFETY: EVENT_TIMEOUT reads an `EventTimeout`, and nothing else, through its argument.
        let done = unsafe { ioctl(&self.0, Setter::<{ dev::EVENT_TIMEOUT }, _>::new(argument)) };
        done.map_err(|errno| AttachError::system("change the time allowed for events", errno))
    }

    /// Tells the tool that the VM is about to be unhooked.
    pub fn pre_unhook(&self) -> io::Result<()> {
        // SAFETY: PREUNHOOK takes no argument.
        let done = unsafe { ioctl(&self.0, NoArg::<{ PREUNHOOK }>::new()) };
        Ok(done?)
    }

    /// Unhooks the VM, if one is hooked.
    pub fn unhook(&self) -> io::Result<()> {
        // SAFETY: UNHOOK takes no argument.
        let done = unsafe { ioctl(&self.0, NoArg::<{ UNHOOK }>::new()) };
        Ok(done?)
    }
}

/// A time in the unit of the ioctl, rounded up: 0 would mean for ever, and so does a time that is
/// too long to be told.
fn milliseconds(time: Duration) -> u32 {
    let ms = time.as_nanos().div_ceil(1_000_000).max(1);
    u32::try_from(ms).unwrap_or(0)
}

fn feature(id: u16, allow: bool) -> Feature {
    Feature {
        allow: allow.into(),
        id: id.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_rounded_up_and_never_zero_by_accident() {
        for (time, ms) in [
            (Duration::ZERO, 1),
            (Duration::from_nanos(1), 1),
            (Duration::from_millis(7), 7),
            (Duration::from_nanos(7_000_001), 8),
            (Duration::from_millis(u32::MAX.into()), u32::MAX),
            (Duration::from_millis(1 << 32), 0),
            (Duration::MAX, 0),
        ] {
            assert_eq!(milliseconds(time), ms, "{time:?}");
        }
    }
}
