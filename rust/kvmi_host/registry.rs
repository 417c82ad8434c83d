// SPDX-License-Identifier: GPL-2.0

//! Which VMs are attached, and as what.

use kernel::{
    prelude::*,
    sync::Arc, //
};

use kvmi_abi::token::MapToken;

use crate::{
    kvm::VmId,
    role::Role,
    session::Session,
    tokens::InUse, //
};

kernel::sync::global_lock! {
    // SAFETY: `Registry::new()` is called before anything else of this file.
    unsafe(uninit) static ROLES: Mutex<KVec<Role>> = KVec::new();
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
        unsafe { ROLES.init() };
        Self
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        *ROLES.lock() = KVec::new();
    }
}

/// Returns the part that the VM `id` plays. It may be one that begins or ends just now.
pub(crate) fn find(id: VmId) -> Option<Role> {
    ROLES.lock().iter().find(|role| role.vm_id() == id).cloned()
}

/// Returns the session of the VM `id`, if that is introspected.
pub(crate) fn find_session(id: VmId) -> Option<Arc<Session>> {
    match find(id) {
        Some(Role::Target(session)) => Some(session),
        _ => None,
    }
}

/// Finds the session that has issued a token, and takes the token into use.
pub(crate) fn find_token(token: &MapToken) -> Option<(Arc<Session>, InUse)> {
    ROLES.lock().iter().find_map(|role| match role {
        Role::Target(session) => Some((session.clone(), session.tokens().present(token)?)),
        Role::Introspector(_) => None,
    })
}

/// A VM's entry in the registry, removed when dropped.
pub(crate) struct Entry(Role);

impl Entry {
    /// Enters a VM, or fails with `EEXIST` if it has an entry.
    pub(crate) fn new(role: Role) -> Result<Self> {
        let mut roles = ROLES.lock();
        if roles.iter().any(|other| other.vm_id() == role.vm_id()) {
            return Err(EEXIST);
        }
        roles.push(role.clone(), GFP_KERNEL)?;
        Ok(Self(role))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut roles = ROLES.lock();
        let at = roles.iter().position(|role| role.is(&self.0));
        let removed = at.and_then(|at| roles.remove(at).ok());
        // Dropping a session may sleep for long: not under the lock.
        drop(roles);
        drop(removed);
    }
}
