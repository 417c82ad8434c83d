// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Waiting for somebody on the host who hooks a VM to this tool.

use std::{
    fmt, fs,
    io::{self, IsTerminal as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context as _, Result};
use kvmi_client::{abi::handshake::VmmHello, tool, Cookie};
use vsock::{VsockListener, VMADDR_CID_ANY};

use crate::{number, output::plain, problem::Problem};

/// How long the other side may take to shake hands.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where to wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A port of the vsock of this machine.
    Vsock(u32),
    /// A UNIX socket, which is made.
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("vsock:") {
            Some(port) => number::parse_u32(port).map(Self::Vsock),
            None if text.is_empty() => Err("expected vsock:PORT or a path".to_owned()),
            None => Ok(Self::Unix(text.into())),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "port {port} of vsock"),
            Self::Unix(path) => f.write_str(&plain(&path.to_string_lossy())),
        }
    }
}

impl Listen {
    /// Waits until a VM is offered; returns the connection to it, and what is said of it.
    pub fn accept(&self, cookie: Option<&Cookie>) -> Result<(OwnedFd, VmmHello)> {
        let socket = self.wait().map_err(|error| {
            Problem::new(format!("cannot wait at {self}: {error}"), self.hint())
        })?;
        let hello = tool::accept(&socket, cookie, HANDSHAKE_TIMEOUT);
        let hello = hello.context("the handshake with the other side failed")?;
        Ok((socket, hello))
    }

    fn wait(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Vsock(port) => {
                let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, *port)?;
                self.announce();
                listener.accept()?.0.as_fd().try_clone_to_owned()
            }
            Self::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                let _name = Name(path);
                self.announce();
                Ok(listener.accept()?.0.into())
            }
        }
    }

    /// Tells people what to do.
    fn announce(&self) {
        if io::stderr().is_terminal() {
            eprintln!("waiting at {self} for a VM: kvmictl attach, on its host");
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::Vsock(_) => {
                "this VM needs a vsock device (QEMU: -device vhost-vsock-pci), and the port must be free"
            }
            Self::Unix(_) => "remove that file if nobody listens there",
        }
    }
}

/// The name of a socket, which is of no use once somebody has connected.
struct Name<'a>(&'a Path);

impl Drop for Name<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

/// Reads a secret.
pub fn read_cookie(file: Option<&Path>) -> Result<Option<Cookie>> {
    let Some(file) = file else {
        return Ok(None);
    };
    let secret = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(Some(Cookie::of_secret(&secret)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixStream, thread};

    use kvmi_client::vmm;

    #[test]
    fn ports_and_paths_are_told_apart() {
        assert_eq!("vsock:4711".parse(), Ok(Listen::Vsock(4711)));
        assert_eq!("/run/x".parse(), Ok(Listen::Unix("/run/x".into())));
        assert_eq!("vsock".parse(), Ok(Listen::Unix("vsock".into())));
        for bad in ["", "vsock:", "vsock:x", "vsock:4294967296"] {
            assert!(bad.parse::<Listen>().is_err(), "{bad}");
        }
    }

    #[test]
    fn vm_is_offered_by_whoever_connects() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tool");
        let listen = Listen::Unix(path.clone());
        let cookie = Cookie::of_secret(b"secret");
        let (_, hello) = thread::scope(|scope| {
            scope.spawn(|| {
                let socket = loop {
                    match UnixStream::connect(&path) {
                        Ok(socket) => break socket,
                        Err(_) => thread::sleep(Duration::from_millis(5)),
                    }
                };
                let hello = VmmHello::new([7; 16], 0, b"web", 0x8000);
                vmm::handshake(socket, &hello, Some(&cookie), HANDSHAKE_TIMEOUT).unwrap();
            });
            listen.accept(Some(&cookie)).unwrap()
        });
        assert_eq!((hello.name(), hello.max_gpa), (&b"web"[..], 0x8000));
        assert!(!path.exists());
    }

    #[test]
    fn place_that_is_taken_is_a_problem_with_a_hint() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Listen::Unix(file.path().into()).accept(None).unwrap_err();
        assert!(error.downcast_ref::<Problem>().is_some());
        assert!(file.path().exists(), "it is somebody else's");
    }
}
