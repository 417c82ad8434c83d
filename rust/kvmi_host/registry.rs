// SPDX-License-Identifier: GPL-2.0

//! Which VMs are hooked.

use kernel::{
    prelude::*,
    sync::Arc, //
};

use crate::{
    kvm::VmId,
    session::Session, //
};

kernel::sync::global_lock! {
    // SAFETY: `Registry::new()` is called before anything else of this file.
    unsafe(uninit) static SESSIONS: Mutex<KVec<Arc<Session>>> = KVec::new();
}

/// What makes the registry usable, for as long as it exists. Statics are not dropped when a module
/// goes: this frees the memory of the list.
pub(crate) struct Registry;

impl Registry {
    /// # Safety
    ///
    /// To be called once, before anything else of this file.
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: By the safety requirements of this function.
        unsafe { SESSIONS.init() };
        Self
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        *SESSIONS.lock() = KVec::new();
    }
}

/// Returns the session of the VM `id`. It may be one that is being hooked or unhooked just now.
pub(crate) fn find(id: VmId) -> Option<Arc<Session>> {
    SESSIONS.lock().iter().find(|s| s.vm_id() == id).cloned()
}

/// A session's entry in the registry, removed when dropped.
pub(crate) struct Entry(Arc<Session>);

impl Entry {
    /// Enters `session`, or fails with `EEXIST` if its VM has one.
    pub(crate) fn new(session: Arc<Session>) -> Result<Self> {
        let mut sessions = SESSIONS.lock();
        if sessions.iter().any(|s| s.vm_id() == session.vm_id()) {
            return Err(EEXIST);
        }
        sessions.push(session.clone(), GFP_KERNEL)?;
        Ok(Self(session))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut sessions = SESSIONS.lock();
        let at = sessions.iter().position(|s| Arc::ptr_eq(s, &self.0));
        let removed = at.and_then(|at| sessions.remove(at).ok());
        // Dropping a session may sleep for long: not under the lock.
        drop(sessions);
        drop(removed);
    }
}
