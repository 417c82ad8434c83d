// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What can go wrong on a connection.

use std::io;

use kvmi_abi::{Command, KvmiError};
use rustix::io::Errno;

/// Result of an operation on a connection.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on a connection failed.
///
/// After most errors no more commands can be given, for a late reply could be taken for that to
/// another command: see [`Error::is_recoverable`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host refused a command; the connection is fine.
    #[error("{command} failed: {0}", command = .1.name())]
    Kvmi(KvmiError, Command),
    /// A socket operation failed.
    #[error("socket error: {0}")]
    Io(#[source] io::Error),
    /// The other side does not keep to the protocol.
    #[error("protocol violation: {0}")]
    Protocol(#[from] ProtocolError),
    /// The other side has closed the connection.
    #[error("the connection was closed by the other side")]
    Closed,
    /// The other side did not answer in time.
    #[error("no answer within the time allowed")]
    Timeout,
    /// A vCPU did not serve a command in time.
    #[error(
        "vCPU {vcpu} did not serve {command} in time: it can only do so inside KVM_RUN, and the VMM \
         has not called that, or not returned to it",
        command = .command.name()
    )]
    VcpuTimeout {
        /// Its index.
        vcpu: u16,
        /// Which command.
        command: Command,
    },
    /// A vCPU that was told to pause did not do so in time.
    #[error(
        "vCPU {0} did not pause in time: it can only do so inside KVM_RUN, and the VMM has not \
         called that, or not returned to it; or an event of this vCPU waits for a reply"
    )]
    NotPaused(u16),
    /// The guest has nothing mapped at this virtual address.
    #[error("nothing is mapped at the virtual address {0:#x}")]
    Unmapped(u64),
    /// A range of memory that ends beyond the last address, or a request larger than a message may
    /// be.
    #[error("the range goes beyond the end of the address space, or the request is too large")]
    Range,
    /// A value was to be the reply to an event that has no use for one.
    #[error("the reply to event {0} carries no value")]
    NoValue(u8),
    /// The other side does not know the secret of the handshake.
    #[error("the cookie of the other side is wrong")]
    Cookie,
    /// An earlier error has made the connection useless.
    #[error("the connection is unusable after an earlier error")]
    Unusable,
}

impl Error {
    /// Whether the connection can be used after this error.
    pub fn is_recoverable(&self) -> bool {
        matches!(
            self,
            Self::Kvmi(..) | Self::Range | Self::Unmapped(_) | Self::NoValue(_)
        )
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::CONNRESET | Errno::PIPE | Errno::NOTCONN => Self::Closed,
            _ => Self::Io(errno.into()),
        }
    }
}

/// How the other side broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A header announces more than a message may have.
    #[error("a message of {0} bytes is too large")]
    Oversized(u16),
    /// The stream ended inside a message.
    #[error("the stream ended inside a message")]
    EndInsideMessage,
    /// A message ends before what it must contain.
    #[error("a message with {got} bytes of payload instead of {wanted}")]
    Size {
        /// Bytes that the message has.
        got: usize,
        /// Bytes that it should have.
        wanted: usize,
    },
    /// A message that is neither an event nor the reply to the command in flight.
    #[error("unexpected message: id {id}, sequence number {seq}")]
    UnexpectedMessage {
        /// Its id.
        id: u16,
        /// Its sequence number.
        seq: u32,
    },
    /// A reply with an error number that does not exist.
    #[error("unknown error number {0}")]
    UnknownError(i32),
    /// An event in a message of the wrong kind, or with an id that no reply can carry.
    #[error("impossible event {0}")]
    ImpossibleEvent(u16),
    /// An access to a page of no kind that exists.
    #[error("impossible kind of access {0:#x}")]
    ImpossibleAccess(u8),
    /// An event of a register that does not exist, or cannot make such events.
    #[error("impossible register {register} in event {event}")]
    ImpossibleRegister {
        /// Which event.
        event: u8,
        /// The number of the register.
        register: u8,
    },
    /// Registers with other MSRs than those asked for.
    #[error("the registers come with other MSRs than asked for")]
    WrongMsrs,
    /// More events than anybody reads.
    #[error("too many events are waiting")]
    TooManyEvents,
    /// A structure of the handshake has an impossible size.
    #[error("the handshake announces {0} bytes")]
    HandshakeSize(u32),
}
