// SPDX-License-Identifier: GPL-2.0

//! Tracepoints: what they tell is described in `include/trace/events/kvmi.h`.
//!
//! [`kernel::tracepoint::declare_trace!`] looks for a tracepoint in the kernel's own bindings, so
//! that this file does for those of a module what it does.

use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    task::Pid, //
};
use kvmi_abi::{
    vcpu_request::EventAnswer,
    wire::Header,
    Event,
    KvmiError, //
};

/// Calls a tracepoint. While it is off this is one branch that is not taken.
///
/// # Safety
///
/// As the tracepoint's: pointers among the arguments must be valid for what it reads.
#[cfg(CONFIG_TRACEPOINTS)]
macro_rules! tracepoint {
    ($name:ident($($arg:expr),* $(,)?)) => {
        ::kernel::macros::paste! {
            if ::kernel::jump_label::static_branch_unlikely!(
                ::kvmi_bindings::[<__tracepoint_ $name>],
                ::kernel::bindings::tracepoint,
                key
            ) {
                ::kvmi_bindings::[<rust_do_trace_ $name>]($($arg),*);
            }
        }
    };
}

/// Does nothing: this kernel has no tracepoints.
#[cfg(not(CONFIG_TRACEPOINTS))]
macro_rules! tracepoint {
    ($name:ident($($arg:expr),* $(,)?)) => {{
        // An unsafe function, so that the callers are the same with and without tracepoints.
        unsafe fn nothing() {}
        $(let _ = $arg;)*
        nothing();
    }};
}

/// Stands for the index of a vCPU where the VM as a whole is meant.
const VM: i32 = -1;

/// The index of a vCPU, or none, as tracepoints have it.
fn index(vcpu: Option<u16>) -> i32 {
    vcpu.map_or(VM, i32::from)
}

/// Sessions since the module was loaded.
static SESSIONS: Atomic<u32> = Atomic::new(0);

/// What the tracepoints of one session have in common: who is concerned.
#[derive(Clone, Copy)]
pub(crate) struct Trace {
    session: u32,
    vmm: Pid,
}

impl Trace {
    /// Begins another session, of a VM that the process `vmm` has created.
    pub(crate) fn new(vmm: Pid) -> Self {
        Self {
            session: SESSIONS.fetch_add(1, Relaxed).wrapping_add(1),
            vmm,
        }
    }

    /// The VM was hooked; it is unhooked when the result is dropped.
    pub(crate) fn hook(self, hooked_by: Pid, uuid: &[u8; 16]) -> HookTold {
        // SAFETY: `uuid` has the 16 bytes that are read.
        unsafe { tracepoint!(kvmi_hook(self.session, self.vmm, hooked_by, uuid.as_ptr())) };
        HookTold(self)
    }

    /// A command has arrived, for a vCPU or for the VM.
    pub(crate) fn command(&self, vcpu: Option<u16>, header: &Header) {
        // SAFETY: There are no pointers.
        unsafe {
            tracepoint!(kvmi_command(
                self.session,
                self.vmm,
                index(vcpu),
                header.id,
                header.seq,
                header.size,
            ))
        };
    }

    /// The reply to the command `request`, data or an error, is about to be sent.
    pub(crate) fn reply(&self, request: &Header, result: &Result<&[u8], KvmiError>) {
        let (error, len) = match result {
            Ok(data) => (0, data.len()),
            Err(error) => (-error.code(), 0),
        };
        // No reply has more data than its header can tell.
        let size = u16::try_from(len).unwrap_or(u16::MAX);
        // SAFETY: There are no pointers.
        unsafe {
            tracepoint!(kvmi_reply(
                self.session,
                self.vmm,
                request.id,
                request.seq,
                error,
                size,
            ))
        };
    }

    /// An event of a vCPU or of the VM is about to be sent.
    pub(crate) fn event(&self, vcpu: Option<u16>, event: Event, seq: u32) {
        // SAFETY: There are no pointers.
        unsafe {
            tracepoint!(kvmi_event(
                self.session,
                self.vmm,
                index(vcpu),
                event.id(),
                seq,
            ))
        };
    }

    /// The reply to an event has arrived; whether the event is outstanding is not known yet.
    pub(crate) fn event_reply(&self, answer: &EventAnswer, seq: u32) {
        // SAFETY: There are no pointers.
        unsafe {
            tracepoint!(kvmi_event_reply(
                self.session,
                self.vmm,
                index(Some(answer.vcpu)),
                answer.event.id(),
                answer.action.code(),
                seq,
            ))
        };
    }
}

/// The VM is hooked, and those who watch know.
pub(crate) struct HookTold(Trace);

impl Drop for HookTold {
    fn drop(&mut self) {
        let Trace { session, vmm } = self.0;
        // SAFETY: There are no pointers.
        unsafe { tracepoint!(kvmi_unhook(session, vmm)) };
    }
}
