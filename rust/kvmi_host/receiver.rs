// SPDX-License-Identifier: GPL-2.0

//! The thread that serves a tool.

use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc, //
    }, //
};
use kvmi_abi::{
    vcpu_request::VcpuMessage,
    wire::{
        Header,
        MAX_MSG_SIZE, //
    },
    Reject,
    Request, //
};
use kvmi_common::kthread::KThread;

use crate::{
    clock::for_ever,
    command::{
        self,
        Scratch, //
    },
    connection::Connection,
    session::Session,
    trace::Trace,
    vcpu::Job, //
};

/// The receive thread of a session. Dropping it closes the connection, ends the thread, and drops
/// what the thread has not read. Fields are dropped in the order of their declaration.
pub(crate) struct Receiver {
    connection: Arc<Connection>,
    _thread: KThread,
    _unread: Unread,
}

impl Receiver {
    /// Starts serving the tool of `session`.
    pub(crate) fn start(session: Arc<Session>) -> Result<Self> {
        let connection = session.connection().clone();
        let mut buffers = Buffers::new()?;

        Ok(Self {
            connection: connection.clone(),
            _unread: Unread(connection),
            _thread: KThread::run(c"kvmi-recv", move || {
                // Whatever ended the service, the tool and the VMM learn it from the socket.
                let _ = serve(&session, &mut buffers);
                session.connection().close();
                session.connection().discard();
                session.release_vcpus();
                // What nobody is asked about is not denied.
                session.vm().clear_access();
                session.tokens().close();
                session.vm().take_back();
            })?,
        })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.connection.close();
    }
}

/// What lies in the socket of a connection when nobody reads it any more: the thread may have been
/// told to stop before it ever ran.
struct Unread(Arc<Connection>);

impl Drop for Unread {
    fn drop(&mut self) {
        self.0.discard();
    }
}

/// The memory that serving needs, allocated once.
struct Buffers {
    payload: KVVec<u8>,
    scratch: Scratch,
}

impl Buffers {
    fn new() -> Result<Self> {
        Ok(Self {
            payload: KVVec::from_elem(0, MAX_MSG_SIZE, GFP_KERNEL)?,
            scratch: Scratch::new()?,
        })
    }
}

/// Serves messages until the stream ends or cannot be trusted any more.
fn serve(session: &Session, buffers: &mut Buffers) -> Result {
    let connection = session.connection();

    while let Some(header) = connection.recv_header()? {
        let len = header.payload_len().ok_or(EMSGSIZE)?;
        let payload = buffers.payload.get_mut(..len).ok_or(EMSGSIZE)?;
        connection.recv_payload(payload)?;
        session.counters().commands.fetch_add(1, Relaxed);

        let policy = session.policy();
        let request = Request::parse(&header, payload, &policy);
        trace(session.trace(), &header, &request);
        let result = match request {
            Ok(Request::Vcpu(message)) => match session.usable_vcpu(message.vcpu) {
                Ok(vcpu) => {
                    vcpu.enqueue(job(&header, &message)?)?;
                    continue;
                }
                Err(error) => Err(error),
            },
            Ok(Request::EventReply(answer)) => {
                let vcpu = session.vcpu(answer.vcpu).map_err(|_| EINVAL)?;
                if !vcpu.answer(header.seq, &answer) {
                    return Ok(());
                }
                continue;
            }
            Ok(request) => command::execute(session, &policy, request, &mut buffers.scratch),
            Err(Reject::Reply(error)) => Err(error),
            Err(Reject::Close(_)) => return Ok(()),
        };
        // As long as the tool likes: nobody waits for this thread.
        connection.reply(&header, result, &for_ever)?;
    }
    Ok(())
}

/// Tells who watches what has arrived.
fn trace(trace: &Trace, header: &Header, request: &Result<Request<'_>, Reject>) {
    match request {
        Ok(Request::EventReply(answer)) => trace.event_reply(answer, header.seq),
        Ok(Request::Vcpu(message)) => trace.command(Some(message.vcpu), header),
        _ => trace.command(None, header),
    }
}

/// Makes a job of a vCPU's command.
fn job(header: &Header, message: &VcpuMessage<'_>) -> Result<Job> {
    let mut payload = KVec::with_capacity(message.payload.len(), GFP_KERNEL)?;
    payload.extend_from_slice(message.payload, GFP_KERNEL)?;
    Ok(Job {
        header: *header,
        command: message.command,
        payload,
    })
}
