// SPDX-License-Identifier: GPL-2.0

//! The ioctls of the protocol: the door for VMMs that know introspection.
//!
//! HOOK belongs to a VM file descriptor; the others work on a session, however it was hooked.

use kernel::{
    prelude::*,
    sync::Arc,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};
use kvmi_abi::ioctl::{
    EventTimeout,
    Feature,
    Hook,
    COMMAND,
    EVENT,
    EVENT_TIMEOUT,
    HOOK,
    PREUNHOOK,
    UNHOOK, //
};
use zerocopy::{
    FromBytes,
    IntoBytes, //
};

use crate::{
    is_ready,
    kvm::Vm,
    registry,
    session::Session,
    settings::{
        self,
        Settings, //
    }, //
};

/// Copies an ioctl's argument from user space; fails with `EFAULT` if it is not readable.
pub(crate) fn read_arg<T: FromBytes + IntoBytes>(arg: usize) -> Result<T> {
    let mut value = T::new_zeroed();
    UserSlice::new(UserPtr::from_addr(arg), size_of::<T>())
        .reader()
        .read_slice(value.as_mut_bytes())?;
    Ok(value)
}

/// Copies an ioctl's result to user space.
pub(crate) fn write_arg<T: IntoBytes + zerocopy::Immutable>(arg: usize, value: &T) -> Result {
    UserSlice::new(UserPtr::from_addr(arg), size_of::<T>())
        .writer()
        .write_slice(value.as_bytes())
}

/// Serves an ioctl on a VM file descriptor.
pub(crate) fn vm_ioctl(vm: &Vm, cmd: u32, arg: usize) -> Result<isize> {
    // As without the module.
    if !is_ready() {
        return Err(EPERM);
    }
    match cmd {
        HOOK => {
            let hook: Hook = read_arg(arg)?;
            if hook.padding != 0 {
                return Err(EINVAL);
            }
            Session::hook(vm, hook.fd, hook.uuid, Settings::default())?;
            Ok(0)
        }
        _ => session_ioctl(registry::find_session(vm.id()), cmd, arg),
    }
}

/// Checks the argument of either door's EVENT_TIMEOUT; returns milliseconds, 0 for ever.
pub(crate) fn time_limit(timeout: EventTimeout) -> Result<u32> {
    if timeout.padding != 0 {
        return Err(EINVAL);
    }
    Ok(timeout.ms)
}

/// Serves an ioctl that concerns a session, if there is one.
///
/// Errors about arguments come before `EFAULT`, "not hooked".
pub(crate) fn session_ioctl(session: Option<Arc<Session>>, cmd: u32, arg: usize) -> Result<isize> {
    let session = session.filter(|s| s.is_hooked());

    match cmd {
        UNHOOK => {
            if let Some(session) = session {
                session.unhook();
            }
        }
        COMMAND => {
            let change = settings::command_change(&read_arg::<Feature>(arg)?)?;
            session.ok_or(EFAULT)?.change_commands(change)?;
        }
        EVENT => {
            let change = settings::event_change(&read_arg::<Feature>(arg)?)?;
            session.ok_or(EFAULT)?.change_events(change);
        }
        PREUNHOOK => session.ok_or(EFAULT)?.preunhook()?,
        EVENT_TIMEOUT => {
            let ms = time_limit(read_arg(arg)?)?;
            session.ok_or(EFAULT)?.set_event_timeout(ms);
        }
        _ => return Err(ENOTTY),
    }
    Ok(0)
}
