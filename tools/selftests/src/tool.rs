// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The tool's side of a connection: raw enough to send anything, strict about what comes back.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use kvmi_abi::{
    command::{CheckId, ControlEvents, GetVersionReply, GuestRange, VmInfo},
    event::EventHeader,
    id::VM_EVENT,
    wire::{ErrorCode, Header},
    Command, Event, KvmiError,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::util::soon;

/// A message from the host.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows.
    pub payload: Vec<u8>,
}

impl Message {
    /// Takes the message for a reply: its data, or its error.
    #[track_caller]
    pub fn reply(self) -> Result<Vec<u8>, KvmiError> {
        let (error, data) =
            ErrorCode::read_from_prefix(&self.payload).expect("a reply begins with an error code");
        assert_eq!(error.padding, 0, "padding of the error code");
        if error.err == 0 {
            return Ok(data.to_vec());
        }
        assert_eq!(data.len(), 0, "bytes after the code of an error");
        Err(KvmiError::from_code(-error.err).expect("an error of the protocol"))
    }
}

/// A connection, seen from the tool.
pub struct Tool {
    stream: UnixStream,
    vmm_end: Option<OwnedFd>,
    seq: u32,
}

impl Tool {
    /// A connection whose other end is there to be hooked to a VM, and stays open as in a VMM.
    pub fn new() -> Self {
        let (stream, vmm_end) = UnixStream::pair().expect("a socket pair can be made");
        Self {
            vmm_end: Some(vmm_end.into()),
            ..Self::on(stream)
        }
    }

    /// A connection of any kind between these ends.
    pub fn between(end: OwnedFd, vmm_end: OwnedFd) -> Self {
        Self {
            vmm_end: Some(vmm_end),
            // Nothing that is done with it depends on the kind of the socket.
            ..Self::on(end.into())
        }
    }

    /// A connection that somebody else has made.
    pub fn on(stream: UnixStream) -> Self {
        let timeout = Some(soon());
        stream.set_read_timeout(timeout).expect("SO_RCVTIMEO");
        stream.set_write_timeout(timeout).expect("SO_SNDTIMEO");
        Self {
            stream,
            vmm_end: None,
            seq: 0,
        }
    }

    /// The number of the descriptor to be hooked.
    #[track_caller]
    pub fn vmm_fd(&self) -> RawFd {
        let end = self.vmm_end.as_ref();
        end.expect("the VMM's end is open").as_raw_fd()
    }

    /// Lets the VMM close its end.
    pub fn close_vmm_end(&mut self) {
        self.vmm_end = None;
    }

    /// Gives up both ends: the tool's first.
    pub fn into_ends(self) -> (UnixStream, Option<OwnedFd>) {
        (self.stream, self.vmm_end)
    }

    /// Closes the tool's end and returns the VMM's.
    pub fn disconnect(self) -> Option<OwnedFd> {
        self.vmm_end
    }

    /// Another handle of the tool's end.
    #[track_caller]
    pub fn another(&self) -> Self {
        Self::on(self.stream.try_clone().expect("a socket can be duplicated"))
    }

    /// How many bytes have arrived and are not received yet.
    #[track_caller]
    pub fn readable(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.stream).expect("FIONREAD")
    }

    /// Gives up sending after this time from now on.
    pub fn set_patience(&self, patience: Duration) {
        let set = self.stream.set_write_timeout(Some(patience));
        set.expect("SO_SNDTIMEO");
    }

    /// The tool will send nothing more.
    pub fn finish_sending(&self) {
        let done = self.stream.shutdown(Shutdown::Write);
        done.expect("a connected socket can be shut down");
    }

    /// The tool will receive nothing more.
    pub fn finish_receiving(&self) {
        let done = self.stream.shutdown(Shutdown::Read);
        done.expect("a connected socket can be shut down");
    }

    /// Sends bytes as they are, in one go.
    pub fn try_send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends bytes as they are.
    #[track_caller]
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.try_send_raw(bytes).expect("the host takes messages");
    }

    /// Sends a message, in one go; returns its sequence number.
    pub fn try_send(&mut self, id: u16, payload: &[u8]) -> io::Result<u32> {
        self.seq = self.seq.wrapping_add(1);
        self.try_send_raw(&message(id, self.seq, payload))?;
        Ok(self.seq)
    }

    /// Sends a message; returns its sequence number.
    #[track_caller]
    pub fn send(&mut self, id: u16, payload: &[u8]) -> u32 {
        let sent = self.try_send(id, payload);
        sent.expect("the host takes messages")
    }

    /// Receives a message; `None` if the host has closed the connection. Fails the test if neither
    /// happens for a long time.
    #[track_caller]
    pub fn receive(&mut self) -> Option<Message> {
        let mut header = Header::default();
        if !self.fill(header.as_mut_bytes()) {
            return None;
        }
        let len = header.payload_len();
        let mut payload = vec![0; len.expect("the host's messages are not too large")];
        // The host may be stopped in the middle of a message.
        self.fill(&mut payload)
            .then_some(Message { header, payload })
    }

    /// Receives just that many bytes; returns whether the connection was open for so long.
    #[track_caller]
    fn fill(&mut self, bytes: &mut [u8]) -> bool {
        match self.stream.read_exact(bytes) {
            Ok(()) => true,
            Err(error) => match error.kind() {
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => false,
                ErrorKind::WouldBlock => panic!("the host says nothing, nor hangs up"),
                _ => panic!("receiving failed: {error}"),
            },
        }
    }

    /// Receives a message; fails the test if the connection is closed.
    #[track_caller]
    pub fn next(&mut self) -> Message {
        self.receive().expect("the connection is open")
    }

    /// Receives the reply to a command sent before.
    #[track_caller]
    pub fn reply_to(&mut self, id: u16, seq: u32) -> Result<Vec<u8>, KvmiError> {
        let message = self.next();
        assert_eq!((message.header.id, message.header.seq), (id, seq));
        message.reply()
    }

    /// Gives a command with any id and payload, and waits for the reply.
    #[track_caller]
    pub fn call_raw(&mut self, id: u16, payload: &[u8]) -> Result<Vec<u8>, KvmiError> {
        let seq = self.send(id, payload);
        self.reply_to(id, seq)
    }

    /// Gives a command with any payload, and waits for the reply.
    #[track_caller]
    pub fn call(&mut self, command: Command, payload: &[u8]) -> Result<Vec<u8>, KvmiError> {
        self.call_raw(command.id(), payload)
    }

    /// Fails the test unless the host has closed the connection, or does so before it says
    /// anything.
    #[track_caller]
    pub fn expect_closed(&mut self) {
        if let Some(message) = self.receive() {
            panic!("message instead of the end: {:?}", message.header);
        }
    }

    /// Reads on until the host closes the connection.
    #[track_caller]
    pub fn drain(&mut self) {
        while self.receive().is_some() {}
    }

    /// GET_VERSION
    #[track_caller]
    pub fn version(&mut self) -> GetVersionReply {
        structure(self.call(Command::GetVersion, &[]))
    }

    /// VM_GET_INFO
    #[track_caller]
    pub fn info(&mut self) -> VmInfo {
        structure(self.call(Command::VmGetInfo, &[]))
    }

    /// VM_CHECK_COMMAND
    #[track_caller]
    pub fn check_command(&mut self, id: u16) -> Result<(), KvmiError> {
        let reply = self.call(Command::VmCheckCommand, check(id).as_bytes());
        nothing(reply)
    }

    /// VM_CHECK_EVENT
    #[track_caller]
    pub fn check_event(&mut self, id: u16) -> Result<(), KvmiError> {
        let reply = self.call(Command::VmCheckEvent, check(id).as_bytes());
        nothing(reply)
    }

    /// VM_CONTROL_EVENTS
    #[track_caller]
    pub fn control_event(&mut self, event: Event, enable: bool) -> Result<(), KvmiError> {
        let control = ControlEvents {
            event_id: event.id(),
            enable: enable.into(),
            ..Default::default()
        };
        nothing(self.call(Command::VmControlEvents, control.as_bytes()))
    }

    /// VM_READ_PHYSICAL
    #[track_caller]
    pub fn read(&mut self, gpa: u64, size: u16) -> Result<Vec<u8>, KvmiError> {
        let reply = self.call(Command::VmReadPhysical, range(gpa, size).as_bytes());
        if let Ok(data) = &reply {
            assert_eq!(data.len(), usize::from(size), "bytes read");
        }
        reply
    }

    /// VM_WRITE_PHYSICAL
    #[track_caller]
    pub fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), KvmiError> {
        nothing(self.call(Command::VmWritePhysical, &write_payload(gpa, data)))
    }

    /// Receives an UNHOOK event; returns its sequence number.
    #[track_caller]
    pub fn unhook_event(&mut self) -> u32 {
        let message = self.next();
        assert_eq!(message.header.id, VM_EVENT);
        let expected = EventHeader {
            event: Event::Unhook.id(),
            padding: [0; 3],
        };
        assert_eq!(message.payload, expected.as_bytes());
        message.header.seq
    }
}

impl AsFd for Tool {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The bytes of a message.
pub fn message(id: u16, seq: u32, payload: &[u8]) -> Vec<u8> {
    let size = payload.len().try_into().expect("a size that can be told");
    let mut bytes = Header { id, size, seq }.as_bytes().to_vec();
    bytes.extend(payload);
    bytes
}

/// The bytes of a message that announces more or less than follows.
pub fn message_announcing(id: u16, size: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Header { id, size, seq: 1 }.as_bytes().to_vec();
    bytes.extend(payload);
    bytes
}

/// The payload of VM_CHECK_COMMAND and VM_CHECK_EVENT.
pub fn check(id: u16) -> CheckId {
    CheckId {
        id,
        ..Default::default()
    }
}

/// The payload of VM_READ_PHYSICAL, and the first part of that of VM_WRITE_PHYSICAL.
pub fn range(gpa: u64, size: u16) -> GuestRange {
    GuestRange {
        gpa,
        size,
        ..Default::default()
    }
}

/// The payload of VM_WRITE_PHYSICAL.
pub fn write_payload(gpa: u64, data: &[u8]) -> Vec<u8> {
    let size = data.len().try_into().expect("a size that can be told");
    let mut payload = range(gpa, size).as_bytes().to_vec();
    payload.extend(data);
    payload
}

/// Takes a reply for one without data.
#[track_caller]
pub fn nothing(reply: Result<Vec<u8>, KvmiError>) -> Result<(), KvmiError> {
    reply.map(|data| assert_eq!(data.len(), 0, "bytes after the code of a success"))
}

/// Takes a reply for one with just this structure.
#[track_caller]
pub fn structure<T: FromBytes>(reply: Result<Vec<u8>, KvmiError>) -> T {
    let data = reply.expect("the command succeeds");
    T::read_from_bytes(&data).expect("the reply has the size of its structure")
}
