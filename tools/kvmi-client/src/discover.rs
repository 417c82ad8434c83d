// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Which processes have VMs, as `/proc` tells it.

use std::os::fd::RawFd;

use procfs::{
    process::{FDTarget, Process},
    ProcError, ProcResult,
};

use crate::{
    attach_error::AttachError,
    qemu::{self, CommandLine},
};

/// What the link of a VM's file descriptor in `/proc` says after `anon_inode:`.
const VM: &str = "kvm-vm";
/// As [`VM`] for that of a vCPU; its number follows.
const VCPU: &str = "kvm-vcpu:";

/// A process that has VMs.
#[derive(Clone, Debug)]
pub struct Vmm {
    /// The process.
    pub pid: i32,
    /// What the process calls itself.
    pub name: String,
    /// What its command line tells, if it is QEMU's.
    pub command_line: CommandLine,
    /// When it was started, in seconds since 1970.
    pub start_time: i64,
    /// When it was started, in ticks since the host was: with the pid, an identity.
    pub start_ticks: u64,
    /// Its file descriptors of VMs.
    pub vm_fds: Vec<RawFd>,
    /// Number of its vCPUs.
    pub vcpus: usize,
}

/// What a look through `/proc` has found.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// The processes with VMs, by pid.
    pub vmms: Vec<Vmm>,
    /// Number of processes that the caller may not look into.
    pub hidden: usize,
}

/// Looks through all processes.
pub fn scan() -> Result<Scan, AttachError> {
    let mut scan = Scan::default();
    for process in procfs::process::all_processes()? {
        match process.and_then(|process| Vmm::of(&process)) {
            Ok(Some(vmm)) => scan.vmms.push(vmm),
            Ok(None) => {}
            Err(ProcError::PermissionDenied(_)) => scan.hidden += 1,
            // It has ended meanwhile.
            Err(_) => {}
        }
    }
    scan.vmms.sort_by_key(|vmm| vmm.pid);
    Ok(scan)
}

/// Looks at one process.
pub fn process(pid: i32) -> Result<Vmm, AttachError> {
    let vmm = Process::new(pid).and_then(|process| Vmm::of(&process));
    match vmm {
        Ok(Some(vmm)) => Ok(vmm),
        Ok(None) => Err(AttachError::NoVm(pid)),
        Err(ProcError::NotFound(_)) => Err(AttachError::NoProcess(pid)),
        Err(ProcError::PermissionDenied(_)) => {
            Err(AttachError::NotPermitted("look into the process"))
        }
        Err(error) => Err(error.into()),
    }
}

/// When a process was started, in ticks since the host was.
pub(crate) fn start_ticks(pid: i32) -> Result<u64, AttachError> {
    let stat = Process::new(pid).and_then(|process| process.stat());
    Ok(stat.map_err(|_| AttachError::Gone)?.starttime)
}

/// Whether a file descriptor of this process is one of a VM.
pub(crate) fn is_own_vm_fd(fd: RawFd) -> bool {
    let info = Process::myself().and_then(|process| process.fd_from_fd(fd));
    info.is_ok_and(|info| is_vm(&info.target))
}

fn is_vm(target: &FDTarget) -> bool {
    matches!(target, FDTarget::AnonInode(name) if name == VM)
}

fn is_vcpu(target: &FDTarget) -> bool {
    matches!(target, FDTarget::AnonInode(name) if name.starts_with(VCPU))
}

impl Vmm {
    /// Describes a process, or gives `None` if it has no VM.
    fn of(process: &Process) -> ProcResult<Option<Self>> {
        let mut vm_fds = Vec::new();
        let mut vcpus = 0;
        // Those that are closed meanwhile are skipped.
        for fd in process.fd()?.flatten() {
            if is_vm(&fd.target) {
                vm_fds.push(fd.fd);
            } else if is_vcpu(&fd.target) {
                vcpus += 1;
            }
        }
        if vm_fds.is_empty() {
            return Ok(None);
        }
        vm_fds.sort_unstable();

        let stat = process.stat()?;
        let arguments = process.cmdline()?;
        Ok(Some(Self {
            pid: process.pid(),
            name: stat.comm,
            command_line: qemu::parse(arguments.iter().map(String::as_str)),
            start_time: start_time(stat.starttime).unwrap_or_default(),
            start_ticks: stat.starttime,
            vm_fds,
            vcpus,
        }))
    }
}

/// Turns ticks since the host was started into seconds since 1970.
fn start_time(ticks: u64) -> Option<i64> {
    let boot = procfs::boot_time_secs().ok()?;
    let since = ticks.checked_div(procfs::ticks_per_second())?;
    boot.checked_add(since)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink, path::Path};

    /// A process as `/proc` shows it, but for its open files.
    fn fake(proc: &Path, links: &[(&str, &str)]) -> Process {
        let dir = proc.join("42");
        fs::create_dir(&dir).unwrap();
        let stat = "42 (qemu (x)) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 500 \
                    0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n";
        fs::write(dir.join("stat"), stat).unwrap();
        fs::write(dir.join("cmdline"), "qemu\0-name\0guest=web\0").unwrap();
        fs::create_dir(dir.join("fd")).unwrap();
        for (fd, target) in links {
            symlink(target, dir.join("fd").join(fd)).unwrap();
        }
        Process::new_with_root(dir).unwrap()
    }

    #[test]
    fn vm_and_vcpu_descriptors_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let links = [
            ("12", "anon_inode:kvm-vm"),
            ("9", "anon_inode:kvm-vm"),
            ("13", "anon_inode:kvm-vcpu:0"),
            ("14", "anon_inode:kvm-vcpu:1"),
            ("15", "anon_inode:kvm-vcpu-stats:1"),
            ("16", "anon_inode:[eventfd]"),
            ("17", "/tmp/anon_inode:kvm-vm"),
            ("18", "nonsense:"),
            ("19", "socket:[1"),
        ];
        let vmm = Vmm::of(&fake(dir.path(), &links)).unwrap().unwrap();
        assert_eq!(vmm.vm_fds, [9, 12]);
        assert_eq!(vmm.vcpus, 2);
        assert_eq!(vmm.name, "qemu (x)");
        assert_eq!(vmm.start_ticks, 500);
        assert_eq!(vmm.command_line.guest_name.as_deref(), Some("web"));
    }

    #[test]
    fn process_without_vm_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let process = fake(dir.path(), &[("3", "anon_inode:kvm-vcpu:0")]);
        assert!(Vmm::of(&process).unwrap().is_none());
        let myself = i32::try_from(std::process::id()).unwrap();
        assert!(matches!(process_error(myself), AttachError::NoVm(_)));
        assert!(matches!(process_error(-5), AttachError::NoProcess(_)));
    }

    fn process_error(pid: i32) -> AttachError {
        super::process(pid).unwrap_err()
    }

    #[test]
    fn start_time_is_in_the_past() {
        let myself = Process::myself().unwrap().stat().unwrap();
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let started = u64::try_from(start_time(myself.starttime).unwrap()).unwrap();
        assert!(started <= now + 1 && started + 86400 > now);
    }
}
