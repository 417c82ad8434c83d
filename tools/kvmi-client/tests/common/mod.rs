// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A host that does what a test tells it.

#![allow(dead_code, reason = "each test uses a part")]

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

use kvmi_client::{
    abi::{event::VmEventMessage, wire::Header, wire::ReplyHead},
    Connection, EventId, KvmiError,
};
use zerocopy::{FromBytes as _, IntoBytes as _};

/// The host's end of the socket.
pub struct Host(pub UnixStream);

impl Host {
    /// Receives a command.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; 8];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::read_from_bytes(&header).unwrap();
        let mut payload = vec![0; header.size.into()];
        self.0.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Answers a command.
    pub fn succeed(&mut self, request: &Header, data: &[u8]) {
        let head = ReplyHead::success(request, data.len()).unwrap();
        self.send(&[head.as_bytes(), data].concat());
    }

    /// Refuses a command.
    pub fn fail(&mut self, request: &Header, error: KvmiError) {
        self.send(ReplyHead::failure(request, error).as_bytes());
    }

    /// Tells that the VM is about to be unhooked.
    pub fn event(&mut self, seq: u32) {
        self.send(VmEventMessage::new(EventId::Unhook, seq).as_bytes());
    }

    /// Sends a header without anything behind it.
    pub fn header(&mut self, id: u16, size: u16, seq: u32) {
        self.send(Header { id, size, seq }.as_bytes());
    }
}

/// Lets `script` be the host in a thread of its own while `test` uses the connection. The host
/// hangs up when its script ends.
pub fn with_host<R>(
    script: impl FnOnce(Host) + Send,
    test: impl FnOnce(Connection<UnixStream>) -> R,
) -> R {
    let (ours, hosts) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(ours);
    connection.set_timeout(Some(Duration::from_secs(5)));
    thread::scope(|scope| {
        scope.spawn(|| script(Host(hosts)));
        test(connection)
    })
}
