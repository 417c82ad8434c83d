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
    abi::{
        event::{EventHeader, VcpuEvent, VmEventMessage},
        vcpu::EventReply,
        wire::{Header, ReplyHead, VcpuHeader},
    },
    Command, Connection, EventId, KvmiError,
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

    /// Tells an event of a vCPU whose rip has the same number.
    pub fn vcpu_event(&mut self, seq: u32, vcpu: u16, event: u16, data: &[u8]) {
        self.send(&vcpu_event(seq, vcpu, event, data));
    }

    /// Receives a command of a vCPU, which must be the expected one; returns what follows the
    /// vCPU's header.
    pub fn receive_for(&mut self, vcpu: u16, command: Command) -> (Header, Vec<u8>) {
        let (header, mut payload) = self.receive();
        assert_eq!(header.id, command.id());
        let (to, _) = VcpuHeader::read_from_prefix(&payload).unwrap();
        let expected = VcpuHeader {
            vcpu,
            ..Default::default()
        };
        assert_eq!(to, expected);
        (header, payload.split_off(size_of::<VcpuHeader>()))
    }

    /// Receives the reply to an event; returns the vCPU, the event and the action.
    pub fn receive_reply(&mut self, seq: u32) -> (u16, u8, u8) {
        let (reply, rest) = self.receive_reply_with_data(seq);
        assert_eq!(rest, []);
        reply
    }

    /// As [`Self::receive_reply`], for an event whose reply has more; returns that, too.
    pub fn receive_reply_with_data(&mut self, seq: u32) -> ((u16, u8, u8), Vec<u8>) {
        let (header, mut payload) = self.receive();
        assert_eq!((header.id, header.seq), (1, seq));
        let rest = payload.split_off(size_of::<EventReply>());
        let reply = EventReply::read_from_bytes(&payload).unwrap();
        let expected = EventReply {
            vcpu: VcpuHeader {
                vcpu: reply.vcpu.vcpu,
                ..Default::default()
            },
            action: reply.action,
            event: reply.event,
            ..Default::default()
        };
        assert_eq!(reply, expected);
        ((reply.vcpu.vcpu, reply.event, reply.action), rest)
    }

    /// Answers `VCPU_GET_INFO` and `VM_PAUSE_VCPU` of a vCPU that can be paused.
    pub fn accept_pause(&mut self, vcpu: u16) {
        let (header, _) = self.receive_for(vcpu, Command::VcpuGetInfo);
        self.succeed(&header, &[0; 8]);
        let (header, payload) = self.receive();
        assert_eq!(header.id, Command::VmPauseVcpu.id());
        assert_eq!(payload, [vcpu as u8, 0, 1, 0, 0, 0, 0, 0]);
        self.succeed(&header, &[]);
    }

    /// Answers `VM_GET_INFO`.
    pub fn tell_vcpus(&mut self, vcpus: u8) {
        let (header, _) = self.receive();
        assert_eq!(header.id, Command::VmGetInfo.id());
        let mut info = [0; 16];
        info[0] = vcpus;
        self.succeed(&header, &info);
    }

    /// Waits for the hang-up, before which nothing else may come.
    pub fn wait_for_end(&mut self) {
        assert_eq!(self.0.read(&mut [0]).unwrap(), 0);
    }

    /// Sends a header without anything behind it.
    pub fn header(&mut self, id: u16, size: u16, seq: u32) {
        self.send(Header { id, size, seq }.as_bytes());
    }
}

/// An event of a vCPU as it is sent.
pub fn vcpu_event(seq: u32, vcpu: u16, event: u16, data: &[u8]) -> Vec<u8> {
    let mut common = VcpuEvent {
        size: size_of::<VcpuEvent>().try_into().unwrap(),
        vcpu,
        ..Default::default()
    };
    common.arch.regs.rip = vcpu.into();
    let event = EventHeader {
        event,
        ..Default::default()
    };
    let payload = [event.as_bytes(), common.as_bytes(), data].concat();
    let header = Header {
        id: 1,
        size: payload.len().try_into().unwrap(),
        seq,
    };
    [header.as_bytes(), &payload].concat()
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
