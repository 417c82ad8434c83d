// SPDX-License-Identifier: GPL-2.0

//! The host side of KVM introspection: hooks VMs to tools.
//!
//! ```text
//!   VMM --- VM fd ioctls --- kvm.ko --.                          .-- receive thread -- socket -- tool
//!                                     +-- Session (one per VM) --+
//!   kvmictl --- /dev/kvmi ioctls -----'                          '-- vCPU threads (callbacks)
//! ```
//!
//! * [`kvm`] is the only part that talks to kvm.ko.
//! * [`session`] is a hooked VM: who may do what, and the order of setting up and tearing down.
//! * [`receiver`] is the thread that serves the tool; [`command`] is what it does.
//! * [`vcpu`] is what a vCPU's thread does for the tool: [`vcpu_command`].
//! * [`connection`] is the tool's socket: who may send, and when it is over.
//! * [`introspector`] is a VM whose guest may map memory of others, with one of a session's [`tokens`].
//! * [`trace`] tells those who watch what goes on.
//! * [`ioctl`] and [`device`] are the two doors through which a VM gets hooked.

mod clock;
mod command;
mod connection;
mod counters;
mod device;
mod introspector;
mod ioctl;
mod kvm;
mod receiver;
mod registry;
mod role;
mod session;
mod settings;
#[cfg(CONFIG_KUNIT)]
mod tests;
mod tokens;
mod trace;
mod vcpu;
mod vcpu_command;

use kernel::{
    miscdevice::MiscDeviceOptions,
    prelude::*,
    sync::atomic::{
        Acquire,
        Atomic,
        Release, //
    }, //
};
use kvmi_common::miscdev::OwnedMiscDevice;

use crate::{
    device::DeviceFile,
    kvm::Registration,
    registry::Registry,
    role::Role, //
};

module! {
    type: KvmiHost,
    name: "kvmi_host",
    authors: ["The KVMI maintainers"],
    description: "Virtual-machine introspection for KVM",
    license: "GPL",
    params: {
        event_timeout_ms: u32 {
            default: 0,
            description: "How long a vCPU waits for the tool, to reply to an event or to read, in milliseconds (0: for ever); then the tool is disconnected",
        },
        hypercall_user: u8 {
            default: 1,
            description: "Whether user mode of a guest may call the tool (0 or 1)",
        },
        hypercall_rate: u32 {
            default: 1000,
            description: "How often user mode of a guest may call the tool, for each vCPU and second (0: as often as it likes)",
        },
    },
}

/// Whether the initialisation is over. It goes without waiting for those who use the module if it
/// fails, so that no VM can be hooked before.
static READY: Atomic<bool> = Atomic::new(false);

/// Whether VMs can be hooked.
pub(crate) fn is_ready() -> bool {
    READY.load(Acquire)
}

/// The end of the initialisation.
struct Ready;

impl Ready {
    fn now() -> Self {
        READY.store(true, Release);
        Self
    }
}

/// The loaded module. Fields are dropped in the order of their declaration: first nobody can open
/// the device any more, then kvm.ko forgets us, then there is no session left to look for. No VM
/// is hooked by then, since a hooked VM and an open file keep the module loaded.
///
/// The provider is registered before the device, as that is what can fail for a reason: another
/// version of kvm.ko.
#[pin_data]
struct KvmiHost {
    _ready: Ready,
    #[pin]
    _device: OwnedMiscDevice<DeviceFile>,
    _provider: Registration<Role>,
    _registry: Registry,
}

impl kernel::InPlaceModule for KvmiHost {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // SAFETY: A module is initialised once, and nothing uses the registry before it has a
            // device and a provider.
            _registry: unsafe { Registry::new() },
            _provider: Registration::new(module)?,
            _device <- OwnedMiscDevice::register(MiscDeviceOptions { name: c"kvmi" }, module),
            _ready: Ready::now(),
        })
    }
}
