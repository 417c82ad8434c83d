// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The commands that need one message each.

use std::os::fd::AsFd;

use kvmi_abi::{
    command::{CheckId, ControlCleanup, ControlEvents, GetVersionReply, VmInfo},
    Command, Event as EventId,
};
use zerocopy::{FromBytes, IntoBytes as _};

use crate::{
    connection::Connection,
    error::{ProtocolError, Result},
};

impl<S: AsFd> Connection<S> {
    /// Gives a command whose reply has a `T`.
    fn ask<T: FromBytes>(&mut self, command: Command) -> Result<T> {
        let data = self.command(command, &[])?;
        self.decode(&data)
    }

    /// Takes a `T` from the data of a reply; hosts newer than this crate may append to it.
    pub(crate) fn decode<T: FromBytes>(&mut self, data: &[u8]) -> Result<T> {
        match T::read_from_prefix(data) {
            Ok((reply, _)) => Ok(reply),
            Err(_) => Err(self.violated(ProtocolError::Size {
                got: data.len(),
                wanted: size_of::<T>(),
            })),
        }
    }

    fn check(&mut self, command: Command, id: u16) -> Result<()> {
        let request = CheckId {
            id,
            ..Default::default()
        };
        self.command(command, &[request.as_bytes()]).map(drop)
    }

    /// Protocol version, size of the largest message and features of the host.
    pub fn get_version(&mut self) -> Result<GetVersionReply> {
        self.ask(Command::GetVersion)
    }

    /// Whether a command is known (else `KVM_ENOENT`) and allowed (else `KVM_EPERM`).
    pub fn check_command(&mut self, id: impl Into<u16>) -> Result<()> {
        self.check(Command::VmCheckCommand, id.into())
    }

    /// Whether an event is known (else `KVM_ENOENT`) and allowed (else `KVM_EPERM`).
    pub fn check_event(&mut self, id: impl Into<u16>) -> Result<()> {
        self.check(Command::VmCheckEvent, id.into())
    }

    /// Number of vCPUs.
    pub fn get_info(&mut self) -> Result<VmInfo> {
        self.ask(Command::VmGetInfo)
    }

    /// Switches an event of the VM on or off.
    pub fn control_events(&mut self, event: EventId, enable: bool) -> Result<()> {
        let request = ControlEvents {
            event_id: event.id(),
            enable: enable.into(),
            ..Default::default()
        };
        self.command(Command::VmControlEvents, &[request.as_bytes()])
            .map(drop)
    }

    /// Says whether unhooking shall put back interceptions (it does unless told otherwise).
    pub fn control_cleanup(&mut self, enable: bool) -> Result<()> {
        let request = ControlCleanup {
            enable: enable.into(),
            ..Default::default()
        };
        self.command(Command::VmControlCleanup, &[request.as_bytes()])
            .map(drop)
    }
}
