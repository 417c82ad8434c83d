// SPDX-License-Identifier: GPL-2.0

//! A hooked VM.
//!
//! Lock order: [`Session::hooked`], then what kvm.ko takes when it attaches and detaches, then
//! everything else of this module. The callbacks of vCPUs and memory slots, which kvm.ko makes
//! with its own locks held, take none of these.

use kernel::{
    current,
    new_mutex,
    new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SpinLock, //
    },
    task::Pid,
    time::{
        Instant,
        Monotonic,
        Msecs, //
    }, //
};
use kvmi_abi::{
    policy::MaskChange,
    Event,
    KvmiError,
    Policy, //
};
use kvmi_common::socket::StreamSocket;

use crate::{
    clock::time_left,
    connection::Connection,
    counters::Counters,
    kvm::{
        AttachedVm,
        Attachment,
        VcpuRemote,
        Vm,
        VmId, //
    },
    module_parameters,
    receiver::Receiver,
    registry,
    role::Role,
    settings::{
        feature_errno,
        Settings, //
    },
    tokens::Tokens,
    trace::{
        HookTold,
        Trace, //
    },
    vcpu::Vcpu, //
};

/// Who is hooked to whom, as given when the VM was hooked.
#[derive(Clone, Copy)]
pub(crate) struct Identity {
    /// Names the VM in diagnostics.
    pub(crate) uuid: [u8; 16],
    /// Process that hooked the VM, in the initial pid namespace.
    pub(crate) hooked_by: Pid,
}

/// What exists as long as the VM is hooked. Fields are dropped in the order of their declaration.
struct Hooked {
    /// Nothing serves the tool any more …
    _receiver: Receiver,
    /// … nor what it has been given for others …
    _tokens: TokensInForce,
    /// … then kvm.ko has nobody to call …
    _attachment: Attachment<Role>,
    /// … which is told to those who watch …
    _told: HookTold,
    /// … and only then the VM can be hooked again, or be destroyed.
    _entry: registry::Entry,
}

/// Tokens can be used until this is dropped.
struct TokensInForce(Arc<Tokens>);

impl Drop for TokensInForce {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A VM that is hooked, or was.
///
/// `Hooked` refers back to the session from three places (the receive thread, kvm.ko, the
/// registry), and so do its vCPUs; [`Session::unhook`] cuts these cycles.
#[pin_data]
pub(crate) struct Session {
    vm_id: VmId,
    identity: Identity,
    trace: Trace,
    connection: Arc<Connection>,
    counters: Counters,
    tokens: Arc<Tokens>,
    /// The tool wants to be told of a coming unhook.
    unhook_event: Atomic<bool>,
    /// How long a vCPU waits for the tool: for the reply to an event, or for room to send
    /// something; 0 means for ever.
    event_timeout_ms: Atomic<u32>,
    /// Whether unhooking restores interceptions; nothing is intercepted so far.
    cleanup: Atomic<bool>,
    /// Whether the CPU's own accesses to the guest's page tables make PF events.
    page_walks: Atomic<bool>,
    #[pin]
    vm: AttachedVm,
    /// By index; empty where kvm.ko has told of no vCPU.
    #[pin]
    vcpus: Mutex<KVec<Option<Arc<Vcpu>>>>,
    #[pin]
    policy: SpinLock<Policy>,
    #[pin]
    hooked: Mutex<Option<Hooked>>,
}

impl Session {
    /// Hooks `vm` to the tool at the other end of the socket `fd` of the current process, which
    /// may do what `settings` say.
    ///
    /// Fails with `EEXIST` if the VM is hooked, `EINVAL` if `fd` is not a connected stream socket,
    /// `EOPNOTSUPP` if the VM cannot be introspected.
    pub(crate) fn hook(vm: &Vm, fd: i32, uuid: [u8; 16], settings: Settings) -> Result<Arc<Self>> {
        // The protocol wants this error before one about the socket.
        if registry::find(vm.id()).is_some() {
            return Err(EEXIST);
        }
        let trace = Trace::new(vm.info().vmm_pid);
        let connection = Connection::new(StreamSocket::from_fd(fd)?, trace);
        let connection = Arc::pin_init(connection, GFP_KERNEL)?;
        let identity = Identity {
            uuid,
            hooked_by: current!().group_leader().pid(),
        };
        let tokens = Tokens::new()?;
        let session = Arc::pin_init(
            pin_init!(Self {
                vm_id: vm.id(),
                identity,
                trace,
                connection,
                counters: Counters::new(),
                tokens,
                unhook_event: Atomic::new(false),
                event_timeout_ms: Atomic::new(
                    settings
                        .event_timeout_ms
                        .unwrap_or(*module_parameters::event_timeout_ms.value()),
                ),
                cleanup: Atomic::new(true),
                page_walks: Atomic::new(settings.page_walks),
                vm <- AttachedVm::new(),
                vcpus <- new_mutex!(KVec::new(), "Session::vcpus"),
                policy <- new_spinlock!(settings.policy, "Session::policy"),
                hooked <- new_mutex!(None, "Session::hooked"),
            }),
            GFP_KERNEL,
        )?;

        // In the reverse order of `Hooked`, so that a failure undoes what was done. The lock makes
        // whoever finds the session in the registry wait until it is hooked or not.
        let mut hooked = session.hooked.lock();
        let role = Role::Target(session.clone());
        let entry = registry::Entry::new(role.clone())?;
        let attachment = Attachment::new(vm, Arc::new(role, GFP_KERNEL)?)?;
        // Told when there is no doubt, but before the first command.
        let told = trace.hook(identity.hooked_by, &identity.uuid);
        let receiver = Receiver::start(session.clone())?;
        *hooked = Some(Hooked {
            _receiver: receiver,
            _tokens: TokensInForce(session.tokens.clone()),
            _attachment: attachment,
            _told: told,
            _entry: entry,
        });
        drop(hooked);
        Ok(session)
    }

    /// Unhooks the VM; does nothing if it is not hooked (any more).
    ///
    /// When this returns the VM can be hooked again. Waits for callbacks and for a command that is
    /// being executed, neither for the tool nor for the VMM.
    pub(crate) fn unhook(&self) {
        let mut hooked = self.hooked.lock();
        drop(hooked.take());
    }

    /// Whether the VM is hooked by this session.
    pub(crate) fn is_hooked(&self) -> bool {
        self.hooked.lock().is_some()
    }

    /// Tells the tool that the VM is about to be unhooked.
    ///
    /// Fails with `EFAULT` if the VM is not hooked, `ENOENT` if the tool cannot be told.
    pub(crate) fn preunhook(&self) -> Result {
        if !self.is_hooked() {
            return Err(EFAULT);
        }
        let wanted = self.unhook_event.load(Relaxed);
        if !wanted || !self.policy().allows_event(Event::Unhook) {
            return Err(ENOENT);
        }
        self.connection
            .send_vm_event(Event::Unhook)
            .map_err(|_| ENOENT)?;
        self.counters.events.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Changes which commands the tool may use.
    pub(crate) fn change_commands(&self, change: MaskChange) -> Result {
        self.policy
            .lock()
            .change_commands(change)
            .map_err(feature_errno)
    }

    /// Changes which events the tool may get.
    pub(crate) fn change_events(&self, change: MaskChange) {
        self.policy.lock().change_events(change);
    }

    /// Returns what the tool may do at the moment.
    pub(crate) fn policy(&self) -> Policy {
        *self.policy.lock()
    }

    /// Switches an event of the VM on or off.
    pub(crate) fn control_event(&self, event: Event, enable: bool) {
        if event == Event::Unhook {
            self.unhook_event.store(enable, Relaxed);
        }
    }

    /// Sets how long a vCPU waits for the tool, in milliseconds; 0 means for ever.
    pub(crate) fn set_event_timeout(&self, ms: u32) {
        self.event_timeout_ms.store(ms, Relaxed);
        for vcpu in self.vcpus.lock().iter().flatten() {
            vcpu.look_at_the_clock();
        }
        self.connection.look_at_the_clock();
    }

    /// Returns how much of that is left in ms, counted from `since`; `None` means for ever.
    pub(crate) fn time_left(&self, since: Instant<Monotonic>) -> Option<Msecs> {
        match self.event_timeout_ms.load(Relaxed) {
            0 => None,
            limit => Some(time_left(limit, since)),
        }
    }

    /// Sets whether the CPU's own accesses to the guest's page tables make PF events.
    pub(crate) fn report_page_walks(&self, report: bool) {
        self.page_walks.store(report, Relaxed);
    }

    /// Returns the same.
    pub(crate) fn reports_page_walks(&self) -> bool {
        self.page_walks.load(Relaxed)
    }

    /// Sets whether unhooking restores interceptions.
    pub(crate) fn control_cleanup(&self, enable: bool) {
        self.cleanup.store(enable, Relaxed);
    }

    /// Returns a vCPU that can execute commands. Fails with `Inval` if there is none, `Again` if it
    /// has not been started and waits for no reply.
    pub(crate) fn usable_vcpu(&self, index: u16) -> Result<Arc<Vcpu>, KvmiError> {
        let vcpu = self.vcpu(index)?;
        if vcpu.is_usable() {
            Ok(vcpu)
        } else {
            Err(KvmiError::Again)
        }
    }

    /// Returns a vCPU by its index. Fails with `Inval` if there is none, `Again` if it exists but
    /// could not be entered for lack of memory.
    pub(crate) fn vcpu(&self, index: u16) -> Result<Arc<Vcpu>, KvmiError> {
        let vcpus = self.vcpus.lock();
        let vcpu = vcpus.get(usize::from(index)).and_then(Clone::clone);
        drop(vcpus);
        vcpu.ok_or(if usize::from(index) < self.vcpu_count() {
            KvmiError::Again
        } else {
            KvmiError::Inval
        })
    }

    /// Returns the number of vCPUs that are online.
    pub(crate) fn vcpu_count(&self) -> usize {
        self.vcpus.lock().len()
    }

    /// Lets go of all vCPUs: there is no tool any more.
    pub(crate) fn release_vcpus(&self) {
        for vcpu in self.vcpus.lock().iter().flatten() {
            vcpu.release();
        }
    }

    /// A vCPU is there.
    pub(crate) fn create_vcpu(
        self: &Arc<Self>,
        index: u32,
        remote: Arc<VcpuRemote>,
    ) -> Result<Arc<Vcpu>> {
        let vcpu = Vcpu::new(index.try_into()?, self.clone(), remote)?;
        self.add_vcpu(vcpu.clone())?;
        // The tool may have gone between the look at the connection and the entry.
        if self.connection.is_closed() {
            vcpu.release();
        }
        Ok(vcpu)
    }

    /// Enters a vCPU.
    fn add_vcpu(&self, vcpu: Arc<Vcpu>) -> Result {
        let mut vcpus = self.vcpus.lock();
        let index = usize::from(vcpu.index());
        while vcpus.len() <= index {
            vcpus.push(None, GFP_KERNEL)?;
        }
        *vcpus.get_mut(index).ok_or(EINVAL)? = Some(vcpu);
        Ok(())
    }

    /// A vCPU is not there any more.
    pub(crate) fn remove_vcpu(&self, index: u16) {
        let mut vcpus = self.vcpus.lock();
        let removed = vcpus.get_mut(usize::from(index)).and_then(Option::take);
        drop(vcpus);
        drop(removed);
    }

    /// A memory slot has changed.
    pub(crate) fn memory_changed(&self) {
        self.counters.memslot_changes.fetch_add(1, Relaxed);
    }

    /// Where the guest's memory is accessed through.
    pub(crate) fn vm(&self) -> &AttachedVm {
        &self.vm
    }

    pub(crate) fn tokens(&self) -> &Arc<Tokens> {
        &self.tokens
    }

    pub(crate) fn vm_id(&self) -> VmId {
        self.vm_id
    }

    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    pub(crate) fn trace(&self) -> &Trace {
        &self.trace
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}
