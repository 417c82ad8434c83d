// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Client of KVMI, the introspection of KVM guests.
//!
//! A *tool* looks into a VM through a socket whose other end the kernel serves. There are two ways
//! to get such a socket:
//!
//! * [`attach`]: hook a running VM through `/dev/kvmi`, whatever VMM it belongs to;
//! * [`tool`]: wait for a VMM that knows introspection to connect and shake hands ([`vmm`] is the
//!   VMM's part of that).
//!
//! Either way a [`Connection`] then speaks the protocol:
//!
//! ```no_run
//! use kvmi_client::attach::Attachment;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (_attachment, mut vm) = Attachment::connect(4711)?;
//! let mut start = [0; 16];
//! vm.read_physical(0x10_0000, &mut start)?;
//! println!("{} vCPUs, {start:02x?}", vm.get_info()?.vcpu_count);
//! # Ok(())
//! # }
//! ```
//!
//! A connection is for one thread; [`Connection::share`] makes more of it.
//!
//! A tool that runs in a VM of its own can map the memory that it looks at: see [`mapped`].
//!
//! Commands of a vCPU take its index, from 0 on. [`Connection::pause_all`] stops all vCPUs for as
//! long as what it returns lives.
//!
//! What comes from the other end is checked and never causes a panic. All calls block, each for a
//! bounded time.

#![deny(missing_docs)]

mod access;
pub mod attach;
mod attach_error;
mod commands;
mod connection;
mod cookie;
mod decoder;
pub mod device;
pub mod discover;
mod error;
mod event;
mod hub;
mod io;
mod link;
pub mod mapped;
mod memory;
mod page_tables;
mod paused;
pub mod qemu;
mod registers;
pub mod symbols;
mod token;
pub mod tool;
mod vcpu;
mod virtual_memory;
pub mod vmm;

pub use access::Access;
pub use attach_error::AttachError;
pub use connection::{Connection, DEFAULT_TIMEOUT};
pub use cookie::Cookie;
pub use decoder::{Decoder, Message};
pub use error::{Error, ProtocolError, Result};
pub use event::{Event, VcpuEvent, VcpuEventKind};
pub use hub::Hub;
pub use kvmi_abi as abi;
pub use kvmi_abi::token::MapToken;
pub use kvmi_abi::vcpu_request::Action;
pub use kvmi_abi::{Command, Event as EventId, KvmiError};
pub use memory::{pages, Bytes, Piece, PAGE_SIZE};
pub use page_tables::TableEntry;
pub use paused::Paused;
pub use registers::Registers;
pub use uuid::Uuid;
