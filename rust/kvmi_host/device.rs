// SPDX-License-Identifier: GPL-2.0

//! `/dev/kvmi`: the door for VMMs that know nothing of introspection.

use kernel::{
    fs::File,
    miscdevice::{
        MiscDevice,
        MiscDeviceRegistration, //
    },
    new_mutex,
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc,
        Mutex, //
    }, //
};
use kvmi_abi::dev::{
    Attach,
    VmStatus,
    ATTACH,
    STATUS_DISCONNECTED,
    STATUS_HOOKED,
    VM_STATUS, //
};

use crate::{
    ioctl::{
        read_arg,
        session_ioctl,
        write_arg, //
    },
    kvm::VmRef,
    registry,
    session::Session, //
};

/// An open file of the device. Closing it unhooks the VM that was hooked through it.
#[pin_data(PinnedDrop)]
pub(crate) struct DeviceFile {
    #[pin]
    session: Mutex<Option<Arc<Session>>>,
}

#[vtable]
impl MiscDevice for DeviceFile {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, _misc: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        KBox::pin_init(
            pin_init!(Self {
                session <- new_mutex!(None, "DeviceFile::session"),
            }),
            GFP_KERNEL,
        )
    }

    fn ioctl(me: Pin<&Self>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            ATTACH => me.attach(read_arg(arg)?),
            VM_STATUS => {
                let status = vm_status(read_arg(arg)?)?;
                write_arg(arg, &status)?;
                Ok(0)
            }
            _ => {
                // Not under the lock: the session has its own, and PREUNHOOK may sleep.
                let session = me.session.lock().clone();
                session_ioctl(session, cmd, arg)
            }
        }
    }
}

impl DeviceFile {
    fn attach(&self, attach: Attach) -> Result<isize> {
        if attach.flags != 0 || attach.padding != 0 {
            return Err(EINVAL);
        }
        let mut session = self.session.lock();
        if session.as_ref().is_some_and(|s| s.is_hooked()) {
            return Err(EEXIST);
        }
        let vm = VmRef::from_fd(attach.vm_fd)?;
        vm.may_attach()?;
        let old = session.replace(Session::hook(&vm, attach.socket_fd, attach.uuid)?);
        // Putting the last reference to the VM unhooks it, and the old session goes with its
        // socket: not under the lock.
        drop(session);
        drop(old);
        Ok(0)
    }
}

#[pinned_drop]
impl PinnedDrop for DeviceFile {
    fn drop(self: Pin<&mut Self>) {
        let session = self.session.lock().take();
        if let Some(session) = session {
            session.unhook();
        }
    }
}

/// Describes the VM behind the file descriptor in `request`.
fn vm_status(request: VmStatus) -> Result<VmStatus> {
    let vm = VmRef::from_fd(request.vm_fd)?;
    let info = vm.info();
    let mut status = VmStatus {
        vm_fd: request.vm_fd,
        max_gpa: info.max_gpa,
        memory_bytes: info.memory_bytes,
        vcpu_count: info.vcpu_count,
        vmm_pid: info.vmm_pid,
        ..VmStatus::default()
    };

    if let Some(session) = registry::find(vm.id()).filter(|s| s.is_hooked()) {
        let identity = session.identity();
        let counters = session.counters();

        status.flags |= STATUS_HOOKED;
        if session.connection().is_closed() {
            status.flags |= STATUS_DISCONNECTED;
        }
        status.hooked_by = identity.hooked_by;
        status.uuid = identity.uuid;
        status.vcpus_served = counters.vcpus_served.load(Relaxed);
        status.commands = counters.commands.load(Relaxed);
        status.events = counters.events.load(Relaxed);
        status.memslot_changes = counters.memslot_changes.load(Relaxed);
    }
    Ok(status)
}
