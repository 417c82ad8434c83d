// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Waiting for the end of an introspection.

use std::{
    io::{self, Read as _},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use kvmi_client::{attach::Target, Error};
use rustix::{
    event::{poll, PollFd, PollFlags, Timespec},
    io::Errno,
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM},
    low_level::pipe,
};

/// How an introspection, or the wait for its end, ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The tool has closed its end of the socket, or the kernel has closed the VM's.
    ToolHungUp,
    /// The VMM has ended.
    VmEnded,
    /// This process was told to end.
    Signal,
    /// Nothing happened in time.
    Timeout,
}

/// Waits for the end. From its creation on, the signals that would end the process are caught.
#[derive(Debug)]
pub struct Waiter {
    /// The VMM, if it is a process of this machine.
    vmm: Option<OwnedFd>,
    socket: OwnedFd,
    signals: UnixStream,
}

impl Waiter {
    /// Watches the process of `target`, if there is one, the signals, and `socket`, for hang-ups
    /// only: data on it is not for us.
    pub fn new(target: Option<&Target>, socket: BorrowedFd<'_>) -> io::Result<Self> {
        Self::watch(target.map(Target::pidfd), socket)
    }

    fn watch(vmm: Option<BorrowedFd<'_>>, socket: BorrowedFd<'_>) -> io::Result<Self> {
        let (signals, sender) = UnixStream::pair()?;
        for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
            pipe::register(signal, sender.try_clone()?)?;
        }
        Ok(Self {
            vmm: vmm.map(|vmm| vmm.try_clone_to_owned()).transpose()?,
            socket: socket.try_clone_to_owned()?,
            signals,
        })
    }

    /// Waits for the first thing to happen.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<End> {
        loop {
            if let Some(end) = self.poll(PollFlags::RDHUP, timeout)? {
                return Ok(end);
            }
        }
    }

    /// Waits for an end or, with `IN` among the flags, until there is something to receive, which
    /// gives `None`.
    fn poll(&self, flags: PollFlags, timeout: Option<Duration>) -> io::Result<Option<End>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let mut fds = [
                PollFd::new(&self.socket, flags),
                PollFd::new(&self.signals, PollFlags::IN),
                // The socket again, for nothing.
                match &self.vmm {
                    Some(vmm) => PollFd::new(vmm, PollFlags::IN),
                    None => PollFd::new(&self.socket, PollFlags::empty()),
                },
            ];
            match poll(&mut fds, remaining(deadline).as_ref()) {
                Ok(0) => return Ok(Some(End::Timeout)),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let [socket, signals, vmm] = fds.map(|fd| fd.revents());
            if self.vmm.is_some() && !vmm.is_empty() {
                return Ok(Some(End::VmEnded));
            }
            if !(socket - PollFlags::IN).is_empty() {
                return Ok(Some(End::ToolHungUp));
            }
            if !signals.is_empty() {
                (&self.signals).read_exact(&mut [0])?;
                return Ok(Some(End::Signal));
            }
            if !socket.is_empty() {
                return Ok(None);
            }
        }
    }

    /// As [`Self::wait`] where this process is the tool itself: a hang-up that is not the end of the
    /// VM is an error.
    pub fn wait_as_tool(&self, timeout: Option<Duration>) -> anyhow::Result<End> {
        let end = self.wait(timeout)?;
        self.judge(end)
    }

    /// As [`Self::wait_as_tool`], or until there is something to receive, which gives `None`.
    pub fn wait_for_message(&self, timeout: Option<Duration>) -> anyhow::Result<Option<End>> {
        let end = self.poll(PollFlags::RDHUP | PollFlags::IN, timeout)?;
        end.map(|end| self.judge(end)).transpose()
    }

    fn judge(&self, end: End) -> anyhow::Result<End> {
        match end {
            End::ToolHungUp if self.vmm_has_ended()? => Ok(End::VmEnded),
            End::ToolHungUp => Err(Error::Closed.into()),
            end => Ok(end),
        }
    }

    /// Whether the VMM is known to have ended. While it does, the socket is closed shortly before the process
    /// is gone, so this allows a moment for the latter.
    pub fn vmm_has_ended(&self) -> io::Result<bool> {
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        let Some(vmm) = &self.vmm else {
            return Ok(false);
        };
        let mut fds = [PollFd::new(vmm, PollFlags::IN)];
        match poll(&mut fds, Some(&moment)) {
            Ok(ready) => Ok(ready != 0),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

fn remaining(deadline: Option<Instant>) -> Option<Timespec> {
    let left = deadline?.saturating_duration_since(Instant::now());
    Some(Timespec {
        tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write as _,
        os::fd::{AsFd as _, OwnedFd},
        process::Command,
    };

    use rustix::process::{pidfd_open, Pid, PidfdFlags};

    const SHORT: Option<Duration> = Some(Duration::from_millis(50));

    fn pidfd(child: &std::process::Child) -> OwnedFd {
        pidfd_open(Pid::from_child(child), PidfdFlags::empty()).unwrap()
    }

    #[test]
    fn each_kind_of_end_is_noticed_and_data_is_left_alone() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let vmm = pidfd(&child);
        let (ours, mut tools) = UnixStream::pair().unwrap();
        let waiter = Waiter::watch(Some(vmm.as_fd()), ours.as_fd()).unwrap();
        assert_eq!(waiter.wait(SHORT).unwrap(), End::Timeout);

        tools.write_all(b"data").unwrap();
        assert_eq!(waiter.wait(SHORT).unwrap(), End::Timeout);
        assert_eq!(waiter.wait_for_message(None).unwrap(), None);

        for _ in 0..2 {
            signal_hook::low_level::raise(SIGTERM).unwrap();
            assert_eq!(waiter.wait(None).unwrap(), End::Signal);
        }
        signal_hook::low_level::raise(SIGTERM).unwrap();
        assert_eq!(waiter.wait_for_message(None).unwrap(), Some(End::Signal));
        assert_eq!(waiter.wait(SHORT).unwrap(), End::Timeout);

        drop(tools);
        assert_eq!(waiter.wait(None).unwrap(), End::ToolHungUp);
        assert!(!waiter.vmm_has_ended().unwrap());
        assert!(waiter.wait_as_tool(None).is_err());

        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(waiter.wait(None).unwrap(), End::VmEnded);
        assert!(waiter.vmm_has_ended().unwrap());
        assert_eq!(waiter.wait_as_tool(None).unwrap(), End::VmEnded);

        let mut data = [0; 4];
        (&ours).read_exact(&mut data).unwrap();
        assert_eq!(&data, b"data");
    }

    #[test]
    fn kernel_shutting_down_the_socket_is_a_hang_up() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let vmm = pidfd(&child);
        let (ours, _tools) = UnixStream::pair().unwrap();
        let waiter = Waiter::watch(Some(vmm.as_fd()), ours.as_fd()).unwrap();
        let kernels = ours.try_clone().unwrap();
        kernels.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(waiter.wait(None).unwrap(), End::ToolHungUp);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn without_a_process_there_are_hang_ups() {
        let (ours, tools) = UnixStream::pair().unwrap();
        let waiter = Waiter::watch(None, ours.as_fd()).unwrap();
        assert_eq!(waiter.wait(SHORT).unwrap(), End::Timeout);
        drop(tools);
        assert_eq!(waiter.wait(None).unwrap(), End::ToolHungUp);
        assert!(!waiter.vmm_has_ended().unwrap());
        assert!(waiter.wait_as_tool(None).is_err());
    }
}
