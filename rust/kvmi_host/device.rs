// SPDX-License-Identifier: GPL-2.0

//! `/dev/kvmi`: the door for VMMs that know nothing of introspection.

use kernel::{
    current,
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
use kvmi_abi::{
    access::{
        ALL,
        PAGE_SIZE, //
    },
    dev::{
        Attach,
        Introspector as IntrospectorArg,
        PageWalks,
        VmAccess,
        VmMemory,
        VmStatus,
        ATTACH,
        EVENT_TIMEOUT,
        INTROSPECTOR,
        PAGE_WALKS,
        STATUS_DISCONNECTED,
        STATUS_HOOKED,
        STATUS_INTROSPECTOR,
        VM_ACCESS,
        VM_MEMORY,
        VM_STATUS, //
    },
    ioctl::{
        EventTimeout,
        COMMAND,
        EVENT, //
    }, //
};

use crate::{
    introspector::Introspector,
    ioctl::{
        read_arg,
        session_ioctl,
        time_limit,
        write_arg, //
    },
    kvm::VmRef,
    registry,
    role::Role,
    session::Session,
    settings::{
        command_change,
        event_change,
        feature_errno,
        Settings, //
    }, //
};

/// What an open file has.
#[derive(Default)]
struct State {
    session: Option<Arc<Session>>,
    /// For the VM that gets hooked next, from the tool's first command on.
    settings: Settings,
}

/// An open file of the device. Closing it unhooks the VM that was hooked through it.
#[pin_data(PinnedDrop)]
pub(crate) struct DeviceFile {
    #[pin]
    state: Mutex<State>,
}

#[vtable]
impl MiscDevice for DeviceFile {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, _misc: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        KBox::pin_init(
            pin_init!(Self {
                state <- new_mutex!(State::default(), "DeviceFile::state"),
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
            VM_MEMORY => {
                let memory = vm_memory(read_arg(arg)?)?;
                write_arg(arg, &memory)?;
                Ok(0)
            }
            EVENT_TIMEOUT => me.set_event_timeout(read_arg(arg)?),
            PAGE_WALKS => me.report_page_walks(read_arg(arg)?),
            INTROSPECTOR => set_introspector(read_arg(arg)?),
            VM_ACCESS => {
                let access = vm_access(read_arg(arg)?)?;
                write_arg(arg, &access)?;
                Ok(0)
            }
            _ => {
                // Not under the lock: the session has its own, and PREUNHOOK may sleep.
                let session = me.state.lock().session.clone();
                match session.filter(|s| s.is_hooked()) {
                    Some(session) => session_ioctl(Some(session), cmd, arg),
                    None => me.prepare(cmd, arg),
                }
            }
        }
    }
}

impl DeviceFile {
    fn attach(&self, attach: Attach) -> Result<isize> {
        if attach.flags != 0 || attach.padding != 0 {
            return Err(EINVAL);
        }
        let mut state = self.state.lock();
        if state.session.as_ref().is_some_and(|s| s.is_hooked()) {
            return Err(EEXIST);
        }
        let vm = VmRef::from_fd(attach.vm_fd)?;
        vm.may_attach()?;
        let session = Session::hook(&vm, attach.socket_fd, attach.uuid, state.settings)?;
        let old = state.session.replace(session);
        // Putting the last reference to the VM unhooks it, and the old session goes with its
        // socket: not under the lock.
        drop(state);
        drop(old);
        Ok(0)
    }

    fn set_event_timeout(&self, timeout: EventTimeout) -> Result<isize> {
        let ms = time_limit(timeout)?;
        let mut state = self.state.lock();
        state.settings.event_timeout_ms = Some(ms);
        if let Some(session) = &state.session {
            session.set_event_timeout(ms);
        }
        Ok(0)
    }

    fn report_page_walks(&self, walks: PageWalks) -> Result<isize> {
        let report = match (walks.report, walks.padding) {
            (0, 0) => false,
            (1, 0) => true,
            _ => return Err(EINVAL),
        };
        let mut state = self.state.lock();
        state.settings.page_walks = report;
        if let Some(session) = &state.session {
            session.report_page_walks(report);
        }
        Ok(0)
    }

    /// Serves an ioctl while nothing is hooked: the masks are for the VM that gets hooked next.
    ///
    /// A tool may send its commands as soon as it is connected, and would see them refused if the
    /// masks could be set only later.
    fn prepare(&self, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            COMMAND => {
                let change = command_change(&read_arg(arg)?)?;
                let policy = &mut self.state.lock().settings.policy;
                policy.change_commands(change).map_err(feature_errno)?;
                Ok(0)
            }
            EVENT => {
                let change = event_change(&read_arg(arg)?)?;
                self.state.lock().settings.policy.change_events(change);
                Ok(0)
            }
            _ => session_ioctl(None, cmd, arg),
        }
    }
}

#[pinned_drop]
impl PinnedDrop for DeviceFile {
    fn drop(self: Pin<&mut Self>) {
        let session = self.state.lock().session.take();
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

    let role = registry::find(vm.id());
    let role = role.filter(Role::is_played);
    if let Some(Role::Introspector(_)) = role {
        status.flags |= STATUS_INTROSPECTOR;
    } else if let Some(Role::Target(session)) = role {
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
        status.held_ns = counters.held_ns.load(Relaxed);
    }
    Ok(status)
}

/// Makes the VM behind the file descriptor in `request` an introspector, or ends that.
fn set_introspector(request: IntrospectorArg) -> Result<isize> {
    let vm = VmRef::from_fd(request.vm_fd)?;
    vm.may_attach()?;
    match (request.enable, registry::find(vm.id())) {
        (1, _) => Introspector::appoint(&vm)?,
        (0, Some(Role::Introspector(introspector))) => introspector.dismiss(),
        (0, _) => return Err(ENOENT),
        _ => return Err(EINVAL),
    }
    Ok(0)
}

/// Tells where the VM behind the file descriptor in `request` has memory.
fn vm_memory(request: VmMemory) -> Result<VmMemory> {
    if request.padding != 0 {
        return Err(EINVAL);
    }
    let (gpa, size) = VmRef::from_fd(request.vm_fd)?.next_memory(request.gpa)?;
    Ok(VmMemory {
        gpa,
        size,
        ..request
    })
}

/// Tells which pages of the VM behind the file descriptor in `request` are restricted.
fn vm_access(request: VmAccess) -> Result<VmAccess> {
    let vm = VmRef::from_fd(request.vm_fd)?;
    let (first, denied) = vm.next_restriction(request.gpa / PAGE_SIZE).ok_or(ENOENT)?;
    let mut end = first + 1;
    while vm.next_restriction(end) == Some((end, denied)) && !current!().signal_pending() {
        end += 1;
    }
    Ok(VmAccess {
        gpa: first * PAGE_SIZE,
        size: (end - first) * PAGE_SIZE,
        access: u32::from(ALL) & !denied,
        ..request
    })
}
