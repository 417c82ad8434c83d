// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Message ids: one table of the commands, one of the events.
//!
//! Even ids concern the VM, odd ids one vCPU. An id of the tables that this version does not serve
//! is answered as an unknown one; it is listed because a VMM may name it in an allow mask.

/// Number of ids in the allow mask of commands.
pub const COMMAND_IDS: u16 = 30;
/// Number of ids in the allow mask of events.
pub const EVENT_IDS: u16 = 20;

/// Message id of an event of the VM (not a command).
pub const VM_EVENT: u16 = 0;
/// Message id of an event of a vCPU and of the reply to one (not a command).
pub const VCPU_EVENT: u16 = 1;

/// What a message concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The whole VM; served by the receive thread.
    Vm,
    /// One vCPU; served on its thread.
    Vcpu,
}

/// Whether this version serves the events of what the guest does by itself, and their commands.
const GUEST_EVENTS: bool = true;

/// Declares an id enum with its table: `Variant = number, "NAME", served`.
macro_rules! ids {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $id:literal, $text:literal, $served:expr;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$doc])* $variant,)*
        }

        impl $name {
            /// All of them, in order of their names in the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The id on the wire.
            pub const fn id(self) -> u16 {
                match self { $(Self::$variant => $id,)* }
            }

            /// The one with this id.
            pub const fn from_id(id: u16) -> Option<Self> {
                match id { $($id => Some(Self::$variant),)* _ => None }
            }

            /// Its name, without the prefix of the C headers.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// Whether this version of the host module implements it.
            pub const fn is_served(self) -> bool {
                match self { $(Self::$variant => $served,)* }
            }

            /// What it concerns.
            pub const fn scope(self) -> Scope {
                if self.id() % 2 == 0 { Scope::Vm } else { Scope::Vcpu }
            }

            /// Its bit in an allow mask.
            pub const fn bit(self) -> u32 {
                1 << self.id()
            }
        }

        impl From<$name> for u16 {
            fn from(value: $name) -> Self {
                value.id()
            }
        }
    };
}

ids! {
    /// Commands of the tool.
    Command {
        /// Protocol version and features.
        GetVersion = 2, "GET_VERSION", true;
        /// Whether a command is known and allowed.
        VmCheckCommand = 4, "VM_CHECK_COMMAND", true;
        /// Whether an event is known and allowed.
        VmCheckEvent = 6, "VM_CHECK_EVENT", true;
        /// Number of vCPUs.
        VmGetInfo = 8, "VM_GET_INFO", true;
        /// Switches an event of the VM on or off.
        VmControlEvents = 10, "VM_CONTROL_EVENTS", true;
        /// Reads guest memory.
        VmReadPhysical = 12, "VM_READ_PHYSICAL", true;
        /// Writes guest memory.
        VmWritePhysical = 14, "VM_WRITE_PHYSICAL", true;
        /// Asks for a pause event of a vCPU.
        VmPauseVcpu = 16, "VM_PAUSE_VCPU", true;
        /// Whether unhooking restores interceptions.
        VmControlCleanup = 18, "VM_CONTROL_CLEANUP", true;
        /// Restricts access to pages.
        VmSetPageAccess = 20, "VM_SET_PAGE_ACCESS", true;
        /// A token by which the tool's own VM maps pages.
        VmGetMapToken = 22, "VM_GET_MAP_TOKEN", true;
        /// TSC frequency.
        VcpuGetInfo = 3, "VCPU_GET_INFO", true;
        /// Switches an event of a vCPU on or off.
        VcpuControlEvents = 5, "VCPU_CONTROL_EVENTS", true;
        /// Reads registers and MSRs.
        VcpuGetRegisters = 7, "VCPU_GET_REGISTERS", true;
        /// Sets the general registers.
        VcpuSetRegisters = 9, "VCPU_SET_REGISTERS", true;
        /// Reads a CPUID leaf.
        VcpuGetCpuid = 11, "VCPU_GET_CPUID", true;
        /// Chooses control registers whose writes make events.
        VcpuControlCr = 13, "VCPU_CONTROL_CR", GUEST_EVENTS;
        /// Injects an exception.
        VcpuInjectException = 15, "VCPU_INJECT_EXCEPTION", true;
        /// Reads XCR0.
        VcpuGetXcr = 17, "VCPU_GET_XCR", true;
        /// Reads the XSAVE area.
        VcpuGetXsave = 19, "VCPU_GET_XSAVE", true;
        /// Sets the XSAVE area.
        VcpuSetXsave = 21, "VCPU_SET_XSAVE", true;
        /// Memory type of a page by the MTRRs.
        VcpuGetMtrrType = 23, "VCPU_GET_MTRR_TYPE", true;
        /// Chooses MSRs whose writes make events.
        VcpuControlMsr = 25, "VCPU_CONTROL_MSR", GUEST_EVENTS;
        /// Switches single-stepping on or off.
        VcpuControlSinglestep = 27, "VCPU_CONTROL_SINGLESTEP", GUEST_EVENTS;
        /// Translates a guest virtual address.
        VcpuTranslateGva = 29, "VCPU_TRANSLATE_GVA", true;
    }
}

impl Command {
    /// Bits of the commands that a VMM cannot disallow.
    pub const ALWAYS_ALLOWED: u32 =
        Self::GetVersion.bit() | Self::VmCheckCommand.bit() | Self::VmCheckEvent.bit();
}

ids! {
    /// Events sent to the tool.
    Event {
        /// The VMM is about to unhook.
        Unhook = 0, "UNHOOK", true;
        /// A vCPU was paused on request.
        Pause = 1, "PAUSE", true;
        /// The guest calls the tool.
        Hypercall = 3, "HYPERCALL", GUEST_EVENTS;
        /// The guest has hit a breakpoint.
        Breakpoint = 5, "BREAKPOINT", GUEST_EVENTS;
        /// The guest writes a control register.
        Cr = 7, "CR", GUEST_EVENTS;
        /// An exception is about to be delivered.
        Trap = 9, "TRAP", true;
        /// The guest writes an extended control register.
        Xsetbv = 11, "XSETBV", GUEST_EVENTS;
        /// The guest accesses a descriptor-table register.
        Descriptor = 13, "DESCRIPTOR", GUEST_EVENTS;
        /// The guest writes an MSR.
        Msr = 15, "MSR", GUEST_EVENTS;
        /// The guest accesses a restricted page.
        Pf = 17, "PF", true;
        /// The guest has executed one instruction.
        Singlestep = 19, "SINGLESTEP", GUEST_EVENTS;
    }
}

impl Event {
    /// Whether it interrupts an instruction that can be run again.
    pub const fn can_retry(self) -> bool {
        matches!(self, Self::Breakpoint | Self::Descriptor | Self::Pf)
    }

    /// Whether the reply to it says which value a register gets.
    pub const fn has_new_value(self) -> bool {
        matches!(self, Self::Cr | Self::Msr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_distinct_and_inside_their_masks() {
        let commands: u32 = Command::ALL.iter().map(|c| c.bit()).fold(0, |all, bit| {
            assert_eq!(all & bit, 0);
            all | bit
        });
        assert_eq!(commands, 0x3fff_fffc & !(1 << 24 | 1 << 26 | 1 << 28));
        assert!(Command::ALL.iter().all(|c| c.id() < COMMAND_IDS));
        assert!(Event::ALL.iter().all(|e| e.id() < EVENT_IDS));
    }

    #[test]
    fn event_message_ids_are_not_commands() {
        assert_eq!(Command::from_id(VM_EVENT), None);
        assert_eq!(Command::from_id(VCPU_EVENT), None);
        assert_eq!(Event::from_id(0), Some(Event::Unhook));
    }
}
