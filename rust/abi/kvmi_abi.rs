// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The KVMI protocol: what travels on the socket, what the ioctls take, and the rules that need
//! neither a kernel nor a socket to be applied.
//!
//! The kernel modules, the client crate, the tools and the tests all compile this one crate, so
//! every structure, number and argument check exists once. It is free of kernel types, of
//! allocation and of `unsafe`. `include/uapi/linux/{kvmi,kvmmem}.h` say the same to C; a test of
//! the `kvmi-client` crate compares the two field by field.
//!
//! All integers are in the byte order of the host. No structure has implicit padding, which the
//! `IntoBytes` derives prove.

#![cfg_attr(not(any(MODULE, test)), no_std)]
#![forbid(unsafe_code)]

pub mod access;
pub mod arch;
pub mod command;
pub mod dev;
pub mod error;
pub mod event;
pub mod guest_control;
pub mod guest_event;
pub mod handshake;
pub mod hypercall;
pub mod hypercall_result;
pub mod id;
pub mod ioctl;
pub mod mem;
pub mod mem_range;
pub mod mtrr;
pub mod policy;
pub mod request;
pub mod token;
pub mod vcpu;
pub mod vcpu_request;
pub mod wire;

pub use error::KvmiError;
pub use id::{Command, Event, Scope};
pub use policy::Policy;
pub use request::{Reject, Request};
pub use vcpu_request::{Action, VcpuRequest};
