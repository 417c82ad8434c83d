// SPDX-License-Identifier: GPL-2.0

//! What commands do.

use kernel::prelude::*;
use kvmi_abi::{
    access::MAX_PAGES,
    command::{
        Features,
        GetVersionReply,
        VmInfo,
        MAX_MEMORY_ACCESS, //
    },
    wire,
    KvmiError,
    Policy,
    Request, //
};
use zerocopy::IntoBytes;

use crate::{
    kvm::{
        can_trace,
        Restriction, //
    },
    session::Session, //
};

/// Where a command's data is put together.
pub(crate) struct Scratch {
    reply: KVec<u8>,
    restrictions: KVec<Restriction>,
}

impl Scratch {
    /// Allocates one.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            reply: KVec::from_elem(0, MAX_MEMORY_ACCESS, GFP_KERNEL)?,
            restrictions: KVec::with_capacity(MAX_PAGES, GFP_KERNEL)?,
        })
    }

    /// Puts `value` in and returns its bytes.
    fn put<T: IntoBytes + zerocopy::Immutable>(&mut self, value: &T) -> Result<&[u8], KvmiError> {
        let len = put(&mut self.reply, value)?;
        Ok(self.reply.get(..len).unwrap_or_default())
    }
}

/// Puts `value` to the begin of `buf` and returns its length.
pub(crate) fn put<T: IntoBytes + zerocopy::Immutable>(
    buf: &mut [u8],
    value: &T,
) -> Result<usize, KvmiError> {
    let bytes = value.as_bytes();
    let slot = buf.get_mut(..bytes.len()).ok_or(KvmiError::TooBig)?;
    slot.copy_from_slice(bytes);
    Ok(bytes.len())
}

/// Executes `request` and returns the data of the reply. May sleep.
pub(crate) fn execute<'a>(
    session: &Session,
    policy: &Policy,
    request: Request<'_>,
    scratch: &'a mut Scratch,
) -> Result<&'a [u8], KvmiError> {
    const NOTHING: &[u8] = &[];

    match request {
        Request::GetVersion => scratch.put(&GetVersionReply {
            version: wire::VERSION,
            // Lossless: the constant is 8184.
            max_msg_size: wire::MAX_MSG_SIZE as u32,
            features: Features {
                singlestep: can_trace().into(),
                ..Features::default()
            },
        }),
        Request::CheckCommand(id) => policy.check_command(id).map(|()| NOTHING),
        Request::CheckEvent(id) => policy.check_event(id).map(|()| NOTHING),
        Request::GetInfo => scratch.put(&VmInfo {
            vcpu_count: u32::try_from(session.vcpu_count()).map_err(|_| KvmiError::TooBig)?,
            padding: [0; 3],
        }),
        Request::ControlEvents { event, enable } => {
            session.control_event(event, enable);
            Ok(NOTHING)
        }
        Request::ReadPhysical { gpa, len } => {
            let buf = scratch.reply.get_mut(..len).ok_or(KvmiError::Inval)?;
            session.vm().read(gpa, buf)?;
            Ok(buf)
        }
        Request::WritePhysical { gpa, data } => {
            session.vm().write(gpa, data)?;
            Ok(NOTHING)
        }
        Request::PauseVcpu { vcpu, wait } => {
            session.vcpu(vcpu)?.pause(wait)?;
            Ok(NOTHING)
        }
        Request::ControlCleanup { enable } => {
            session.control_cleanup(enable);
            Ok(NOTHING)
        }
        Request::SetPageAccess(list) => {
            let pages = &mut scratch.restrictions;
            pages.clear();
            for page in list.pages() {
                let pushed = pages.push_within_capacity(Restriction::new(&page));
                pushed.map_err(|_| KvmiError::TooBig)?;
            }
            session.vm().set_access(pages)?;
            Ok(NOTHING)
        }
        Request::GetMapToken { writable } => {
            let mut token = session.tokens().issue(writable)?;
            let put = scratch.put(&token);
            token.wipe();
            put
        }
        // Not commands of the VM: see the receiver.
        Request::Vcpu(_) | Request::EventReply(_) => Err(KvmiError::NoSys),
    }
}
