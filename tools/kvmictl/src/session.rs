// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A VM, hooked for the time of one command.

use std::{
    fmt, io, ops,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result};
use kvmi_client::{
    attach::{Attachment, Target},
    device::Device,
    Connection, Paused,
};
use serde::Serialize;

use crate::{
    cli::{Range, Reach},
    listen::{read_cookie, Listen},
    output::{gpa, plain},
    problem::Problem,
    select,
    wait::Waiter,
};

/// How long the vCPUs may take to pause.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Guest physical addresses of a memory slot.
type Slot = ops::Range<u64>;

/// Which VM it is.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    /// The process that it belongs to, if that is on this machine.
    pub pid: Option<i32>,
    /// What it is called by whoever has hooked it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, &self.name) {
            (Some(pid), _) => write!(f, "the VM of process {pid}"),
            (None, Some(name)) => write!(f, "the VM {}", plain(name)),
            (None, None) => f.write_str("the VM"),
        }
    }
}

/// A hooked VM.
#[derive(Debug)]
pub struct Session {
    /// The connection to it. (Before the hook: fields are dropped in order.)
    pub vm: Connection<OwnedFd>,
    subject: Subject,
    vcpu_count: u32,
    /// Above all of its memory, if that is known.
    max_gpa: Option<u64>,
    /// Where it had memory when it was hooked, as far as is known.
    memory: Vec<Slot>,
    /// What hooks it, unless somebody else does.
    hook: Option<(Attachment, Target)>,
}

impl Session {
    /// Hooks a VM of this machine, or waits for somebody to do so with one of another.
    pub fn open(reach: &Reach) -> Result<Self> {
        match &reach.listen {
            None => Self::hook(reach),
            Some(listen) => {
                let cookie = read_cookie(reach.tool_cookie_file.as_deref())?;
                Self::accept(listen, cookie.as_ref())
            }
        }
    }

    fn hook(reach: &Reach) -> Result<Self> {
        let (_, target) = select::target(&reach.vm)?;
        let device = Device::open()?;
        let status = target.status(&device)?;
        let memory = target.memory(&device)?;
        let (attachment, socket) = Attachment::socket_to(&target, device)?;
        Ok(Self {
            vm: Connection::new(socket.into()),
            subject: Subject {
                pid: Some(target.pid()),
                name: None,
            },
            vcpu_count: status.vcpu_count,
            max_gpa: Some(status.max_gpa),
            memory,
            hook: Some((attachment, target)),
        })
    }

    fn accept(listen: &Listen, cookie: Option<&kvmi_client::Cookie>) -> Result<Self> {
        let (socket, hello) = listen.accept(cookie)?;
        let mut vm = Connection::new(socket);
        let info = vm.get_info().context("the VM was not hooked")?;
        let name = String::from_utf8_lossy(hello.name()).into_owned();
        // Not every host says so.
        let max_gpa = Some(hello.max_gpa).filter(|end| *end != 0);
        let whole = 0..max_gpa.unwrap_or(u64::MAX);
        Ok(Self {
            vm,
            subject: Subject {
                pid: None,
                name: Some(name).filter(|name| !name.is_empty()),
            },
            vcpu_count: info.vcpu_count,
            max_gpa,
            memory: vec![whole],
            hook: None,
        })
    }

    /// Which VM it is.
    pub fn subject(&self) -> Subject {
        self.subject.clone()
    }

    /// Watches for the end of the VM and for signals, which from now on do not end this process.
    pub fn watch(&self) -> io::Result<Waiter> {
        let target = self.hook.as_ref().map(|(_, target)| target);
        Waiter::new(target, self.vm.stream().as_fd())
    }

    /// Sets for how long the VM may be paused, or wait for a reply otherwise, before the host breaks
    /// the connection; `None` is for ever. If somebody else has it hooked that is up to them.
    pub fn allow_pause(&self, time: Option<Duration>) -> Result<()> {
        let time = time.map(|time| time.saturating_add(PAUSE_TIMEOUT));
        match &self.hook {
            Some((attachment, _)) => Ok(attachment.device().set_event_timeout(time)?),
            None => Ok(()),
        }
    }

    /// Sets whether accesses of the CPU to the guest's page tables make events.
    pub fn report_page_walks(&self, report: bool) -> Result<()> {
        match &self.hook {
            Some((attachment, _)) => Ok(attachment.device().report_page_walks(report)?),
            // They do not unless told otherwise.
            None if !report => Ok(()),
            None => {
                let what = "page walks can be reported only where the VM runs";
                Err(Problem::new(what, "use --pid, on the host, rather than --listen").into())
            }
        }
    }

    /// Pauses the VM until what this returns is dropped.
    pub fn pause(&mut self) -> Result<Paused<'_, OwnedFd>> {
        let paused = self.vm.pause_all(PAUSE_TIMEOUT);
        paused.context("cannot pause the VM")
    }

    /// Checks that the VM has a vCPU.
    pub fn check_vcpu(&self, vcpu: u16) -> Result<()> {
        check_vcpu(vcpu, self.vcpu_count)
    }

    /// All vCPUs that the VM had when it was hooked.
    pub fn vcpus(&self) -> Vec<u16> {
        // Indices have 16 bits.
        (0..u16::try_from(self.vcpu_count).unwrap_or(u16::MAX)).collect()
    }

    /// Unhooks the VM. Where somebody else has hooked it, to hang up is enough.
    pub fn close(self) -> Result<()> {
        drop(self.vm);
        if let Some((attachment, _)) = self.hook {
            attachment.unhook()?;
        }
        Ok(())
    }

    /// Checks that the VM may have memory below a guest physical address.
    pub fn check_end(&self, end: u64) -> Result<()> {
        match self.max_gpa {
            Some(max) if end > max => {
                let what = format!("the guest has no memory above {}", gpa(max));
                Err(Problem::new(what, "numbers are guest physical addresses").into())
            }
            _ => Ok(()),
        }
    }

    /// The addresses that a range means: the first one, and how many.
    pub fn resolve(&self, range: &Range) -> Result<(u64, u64)> {
        resolve(range, self.max_gpa)
    }

    /// The parts of `len` bytes at `start` where the VM may have memory: first address and length.
    pub fn memory(&self, start: u64, len: u64) -> Vec<(u64, u64)> {
        clip(&self.memory, start, len)
    }
}

fn check_vcpu(vcpu: u16, count: u32) -> Result<()> {
    if u32::from(vcpu) < count {
        return Ok(());
    }
    let what = format!("there is no vCPU {vcpu}: the VM has {count}");
    Err(Problem::new(what, "vCPUs are numbered from 0 on").into())
}

fn clip(slots: &[Slot], start: u64, len: u64) -> Vec<(u64, u64)> {
    let end = start.saturating_add(len);
    slots
        .iter()
        .map(|slot| (slot.start.max(start), slot.end.min(end)))
        .filter(|(from, to)| from < to)
        .map(|(from, to)| (from, to - from))
        .collect()
}

fn resolve(range: &Range, end: Option<u64>) -> Result<(u64, u64)> {
    let Some(to) = range.to.or(end) else {
        let what = "it is not known where the guest's memory ends";
        return Err(Problem::new(what, "give --to").into());
    };
    match to.checked_sub(range.from) {
        Some(len) if len > 0 => Ok((range.from, len)),
        _ => {
            let what = format!("there is nothing from {} to {}", gpa(range.from), gpa(to));
            Err(Problem::new(what, "--to must be above --from").into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_without_memory_are_left_out() {
        let slots = [0..10, 20..30, 30..40];
        assert_eq!(clip(&slots, 0, 100), [(0, 10), (20, 10), (30, 10)]);
        assert_eq!(clip(&slots, 5, 20), [(5, 5), (20, 5)]);
        assert_eq!(clip(&slots, 10, 10), []);
        assert_eq!(clip(&slots, 39, u64::MAX), [(39, 1)]);
    }

    #[test]
    fn subject_is_known_by_its_process_or_its_name() {
        let subject = |pid, name: Option<&str>| Subject {
            pid,
            name: name.map(str::to_owned),
        };
        let hooked = subject(Some(42), None);
        assert_eq!(hooked.to_string(), "the VM of process 42");
        assert_eq!(serde_json::to_string(&hooked).unwrap(), r#"{"pid":42}"#);
        assert_eq!(subject(None, Some("w\x1bb")).to_string(), "the VM w?b");
        assert_eq!(subject(None, None).to_string(), "the VM");
    }

    #[test]
    fn vcpus_are_numbered_from_zero() {
        assert!(check_vcpu(1, 2).is_ok());
        let error = check_vcpu(2, 2).unwrap_err();
        assert!(error.to_string().contains("no vCPU 2"), "{error}");
    }

    #[test]
    fn ranges_end_where_the_memory_does_unless_told_otherwise() {
        let range = |from, to| Range { from, to };
        let end = Some(100);
        assert_eq!(resolve(&range(0, None), end).unwrap(), (0, 100));
        assert_eq!(resolve(&range(10, Some(30)), end).unwrap(), (10, 20));
        assert_eq!(resolve(&range(10, Some(300)), end).unwrap(), (10, 290));
        assert_eq!(resolve(&range(10, Some(300)), None).unwrap(), (10, 290));
        assert!(resolve(&range(10, None), None).is_err());
        for empty in [range(100, None), range(10, Some(10)), range(10, Some(9))] {
            assert!(resolve(&empty, end).is_err());
        }
    }
}
