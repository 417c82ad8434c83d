// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Errors as the user gets to see them: what went wrong and what to do about it.

use std::{fmt, io};

use kvmi_client::{
    mapped::MapError,
    symbols::{LoadError, LocateError, LookupError},
    AttachError, Command, Error, KvmiError,
};
use serde_json::json;

/// An error of this program's own, with a hint.
#[derive(Debug)]
pub struct Problem {
    what: String,
    hint: &'static str,
}

impl Problem {
    /// Builds the error.
    pub fn new(what: impl Into<String>, hint: &'static str) -> Self {
        Self {
            what: what.into(),
            hint,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Problem {}

/// Tells an error on the standard error.
pub fn report(error: &anyhow::Error, as_json: bool) {
    let hint = hint(error);
    if as_json {
        eprintln!("{}", json!({ "error": message(error), "hint": hint }));
        return;
    }
    eprintln!("kvmictl: {}", message(error));
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
}

/// Whether the reader of the output has gone away.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// The error and its causes, none of them twice: some errors repeat their cause.
fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    message
}

/// What can be done about an error.
fn hint(error: &anyhow::Error) -> Option<&'static str> {
    error.chain().find_map(|cause| {
        if let Some(problem) = cause.downcast_ref::<Problem>() {
            return Some(problem.hint);
        }
        if let Some(error) = cause.downcast_ref::<AttachError>() {
            return attach_hint(error);
        }
        if let Some(error) = cause.downcast_ref::<MapError>() {
            return map_hint(error);
        }
        symbols_hint(cause).or(cause.downcast_ref::<Error>().and_then(connection_hint))
    })
}

fn symbols_hint(error: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    if let Some(error) = error.downcast_ref::<LoadError>() {
        return Some(match error {
            LoadError::Hidden => "read it as root in the guest, with kernel.kptr_restrict below 2",
            LoadError::Io(_) => return None,
            _ => {
                "give the System.map of the guest's kernel, or its /proc/kallsyms as root reads it"
            }
        });
    }
    if let Some(error) = error.downcast_ref::<LookupError>() {
        return Some(match error {
            LookupError::Ambiguous { .. } => {
                "give the address that you mean; of guard and watch, the physical one, which kvmictl \
                 translate tells"
            }
            LookupError::Unknown(_) => {
                "look it up in the file of --symbols; there, symbols of modules are those of /proc/kallsyms"
            }
            _ => return None,
        });
    }
    Some(match error.downcast_ref::<LocateError>()? {
        LocateError::Connection(error) => return connection_hint(error),
        LocateError::NotMapped => {
            "try again, maybe several times, or while the guest has less to do"
        }
        LocateError::Incomplete(_) => "give the System.map of the guest's kernel",
        _ => "give the System.map of the very build that the guest runs, or its own /proc/kallsyms",
    })
}

fn attach_hint(error: &AttachError) -> Option<&'static str> {
    Some(match error {
        AttachError::NoModule => "load the module: modprobe kvmi_host",
        AttachError::NotPermitted(_) => {
            "run this as root, or with CAP_SYS_ADMIN and, unless the VMM is your own process, \
             CAP_SYS_PTRACE"
        }
        AttachError::NoProcess(_) | AttachError::NoVm(_) => {
            "kvmictl list shows the VMs and their processes"
        }
        AttachError::SeveralVms { .. } => "choose one with --vm-fd N",
        AttachError::Gone => "kvmictl list shows the VMs that still run",
        AttachError::AlreadyHooked { .. } => {
            "one tool at a time can look into a VM: end the other one first (kvmictl list shows it)"
        }
        AttachError::Unsupported => {
            "confidential VMs (SEV, TDX) and VMs that run VMs themselves are out of reach"
        }
        AttachError::Connection(error) => return connection_hint(error),
        _ => return None,
    })
}

fn map_hint(error: &MapError) -> Option<&'static str> {
    Some(match error {
        MapError::NoDevice => {
            "load the module in this VM: modprobe kvmmem; where the VM's host is, leave out --map"
        }
        MapError::NotPermitted => "run this as root",
        MapError::NoWindow { .. } => "it counts as locked memory: raise that limit (ulimit -l)",
        MapError::Unsupported => "leave out --map, or load a newer kvmi_host on the host",
        MapError::NotIntrospector => {
            "on the host, for the VM that this runs in: kvmictl introspector --on (while a VM logs its \
             writes to a ring, it cannot be mapped either)"
        }
        MapError::Absent(_) => "kvmictl info, on the host, shows where the guest's memory ends",
        MapError::Busy(_) => "its memory changes all the time: try again",
        MapError::Connection(error) => return connection_hint(error),
        _ => return None,
    })
}

fn connection_hint(error: &Error) -> Option<&'static str> {
    Some(match error {
        Error::Kvmi(KvmiError::NoEnt, Command::VcpuGetCpuid) => "the vCPU has no such CPUID leaf",
        Error::Kvmi(KvmiError::Inval, Command::VcpuGetRegisters) => {
            "one of the MSRs does not exist, or is none that can be read"
        }
        Error::Kvmi(KvmiError::Inval, Command::VcpuInjectException) => {
            "exceptions that are traps, and some others, cannot be injected"
        }
        Error::Kvmi(KvmiError::Busy, Command::VcpuInjectException) => {
            "another exception or interrupt is on its way: try again"
        }
        Error::Kvmi(KvmiError::Inval, Command::VmSetPageAccess) => {
            "a page must have memory, and the CPU must know such a restriction: whoever may write may \
             read, and only some Intel CPUs can execute what cannot be read"
        }
        Error::Kvmi(KvmiError::Inval, Command::VcpuControlEvents) | Error::Kvmi(KvmiError::NoSys, _) => {
            "load a newer kvmi_host where the VM runs"
        }
        Error::Kvmi(KvmiError::Busy, Command::VcpuControlEvents) => {
            "the VMM debugs the guest, and has its breakpoints: end that first"
        }
        Error::Kvmi(KvmiError::OpNotSupp, Command::VcpuControlEvents) => {
            "this CPU cannot tell of that"
        }
        Error::Kvmi(KvmiError::Inval, Command::VcpuControlMsr) => {
            "the host cannot tell of writes to this MSR"
        }
        Error::Kvmi(KvmiError::Perm, Command::VcpuControlMsr) => {
            "the VMM does not let the guest write this MSR, or whoever hooked the VM does not allow this"
        }
        Error::Kvmi(KvmiError::Again, _) => "the guest has not started this vCPU yet",
        Error::VcpuTimeout { .. } | Error::NotPaused(_) => {
            "the VMM may have stopped the VM: let it run on (QEMU: cont)"
        }
        Error::Unmapped(_) => {
            "what belongs to a process is mapped only while a vCPU runs that; --vcpu chooses a vCPU"
        }
        Error::Kvmi(KvmiError::NoEnt, _) => {
            "the guest has no memory there; kvmictl info shows where its memory ends"
        }
        Error::Kvmi(KvmiError::Perm, _) => "whoever hooked the VM does not allow this",
        Error::Closed => "the VM has ended or was unhooked, or the tool has hung up",
        Error::Timeout => "the other side is stuck; the kernel's log may tell more",
        Error::Cookie => "give kvmictl and the tool the same secret, line feeds included",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn hints_are_found_below_context() {
        let error = anyhow::Error::new(AttachError::NoModule).context("cannot hook");
        assert_eq!(message(&error), "cannot hook: /dev/kvmi does not exist");
        assert!(hint(&error).unwrap().contains("modprobe"));

        let closed = AttachError::Connection(Error::Closed);
        assert!(hint(&closed.into()).is_some());
        let unknown = anyhow::Error::new(MapError::NotIntrospector).context("cannot read");
        assert!(hint(&unknown).unwrap().contains("introspector --on"));
        let closed = MapError::Connection(Error::Closed);
        assert!(hint(&closed.into()).is_some());
        let problem = Problem::new("what", "do that");
        assert_eq!(hint(&problem.into()), Some("do that"));
        assert_eq!(hint(&anyhow::anyhow!("x")), None);
    }

    #[test]
    fn hooked_vm_names_the_other_process() {
        let error = AttachError::AlreadyHooked { by: Some(99) };
        assert!(message(&error.into()).contains("by process 99"));
    }

    #[test]
    fn hint_depends_on_the_command() {
        let hint_for = |command| hint(&Error::Kvmi(KvmiError::NoEnt, command).into()).unwrap();
        assert!(hint_for(Command::VcpuGetCpuid).contains("leaf"));
        assert!(hint_for(Command::VmReadPhysical).contains("memory"));
        assert!(hint(&Error::NotPaused(1).into()).unwrap().contains("cont"));
    }

    #[test]
    fn message_does_not_repeat_itself() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let text = refused.to_string();
        let error = Err::<(), _>(Error::Io(refused)).context("top").unwrap_err();
        assert_eq!(message(&error).matches(&text).count(), 1);
    }

    #[test]
    fn only_a_broken_pipe_is_one() {
        let pipe = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(&pipe.into()));
        assert!(!is_broken_pipe(&anyhow::Error::new(Error::Closed)));
    }
}
