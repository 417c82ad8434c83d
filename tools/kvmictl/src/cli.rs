// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The command line.

mod access;
mod events;
mod vcpu;

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use kvmi_client::{Command as Kvmi, EventId, Uuid};

use crate::{
    address::Address,
    allow::{self, Allowed},
    listen::Listen,
    number,
};

pub use access::{Guard, List as AccessList, Until, Watch};
pub use events::{Break, Kinds, Step, Trace};
pub use vcpu::{Cpuid, Inject, Pause, Regs, Top, Translate};

/// Looks into running KVM guests, whatever VMM runs them.
///
/// Needs the module kvmi_host in the host's kernel and, except for `list`, the rights of root. With
/// --listen, it is another machine that needs both.
#[derive(Debug, Parser)]
#[command(name = "kvmictl", version, max_term_width = 100)]
pub struct Cli {
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the VMs that run on this host.
    List,
    /// Show what a VM is and what may be done with it.
    Info(Info),
    /// Print guest memory.
    Read(Read),
    /// Change guest memory.
    Write(Write),
    /// Save guest memory to a file.
    ///
    /// The guest runs on meanwhile, so the pages are not all of the same moment. Where the guest
    /// has no memory, the file has holes.
    Dump(Dump),
    /// Search guest memory.
    ///
    /// Prints the guest physical address of each occurrence, those across pages included.
    Find(Find),
    /// Stop the vCPUs of a VM for a while.
    ///
    /// They run on when the time is over or at an interrupt; or when this process ends in whatever
    /// way, since what it does to the VM ends with it. There is no command to resume, therefore.
    /// The VMM itself is not stopped.
    Pause(Pause),
    /// Print the registers of vCPUs.
    ///
    /// The VM is paused meanwhile, so the registers are all of the same moment.
    Regs(Regs),
    /// Print what the instruction CPUID tells the guest.
    Cpuid(Cpuid),
    /// Translate a guest virtual address.
    ///
    /// Prints the guest physical address as of this moment; that nothing is mapped there is an
    /// error.
    Translate(Translate),
    /// Inject an exception into a vCPU.
    ///
    /// Waits until it is delivered, and says what has really become of it: another exception may
    /// take its place, or it may get lost, both of which are errors.
    Inject(Inject),
    /// Show again and again what the vCPUs are doing.
    ///
    /// The VM is paused for a moment each time.
    Top(Top),
    /// Deny the guest accesses to a part of its memory, and report those that it tries.
    ///
    /// Each line has the vCPU, the kind of access, the addresses, and where in the guest it comes
    /// from. With --block the access is not done: an instruction that does nothing but to store is
    /// skipped, any other one raises #GP in the guest. All restrictions end with this process, in
    /// whatever way it ends.
    ///
    /// To read cannot be denied alone: --deny rwx, or rw where the CPU can only execute (Intel). Each
    /// instruction in a page where x is denied is reported, and executed on its own.
    Guard(Guard),
    /// Report writes to a structure of the guest.
    ///
    /// As `guard --deny w`, but for a few bytes: other writes to the same page are not reported.
    Watch(Watch),
    /// Report what the guest does: writes to registers, hypercalls, and the like.
    ///
    /// As strace does for a process. Each line has the time since the beginning, the vCPU, where in the
    /// guest the instruction is, and what it does; counters follow at the end. The guest goes on as if
    /// nobody looked, but for the time that it takes: a register gets what the guest writes.
    Trace(Trace),
    /// Report when the guest gets to some instructions.
    ///
    /// Puts a breakpoint instruction (INT3) in front of each, into the guest's memory. Whoever hits one
    /// executes the instruction that belongs there, while the other vCPUs stand still. Breakpoints of
    /// the guest's own are its business.
    ///
    /// The memory is as before when kvmictl ends, unless it is killed by SIGKILL: a guest that hits a
    /// breakpoint then crashes. So may one that starts another vCPU, and has it hit one within a second.
    /// The addresses must be those of instructions, and of kernel code that the guest does not patch.
    Break(Break),
    /// Execute single instructions of a vCPU, and print them.
    ///
    /// The other vCPUs stand still meanwhile.
    Step(Step),
    /// Show which pages of a VM are restricted.
    ///
    /// Does not hook the VM itself.
    Access(AccessList),
    /// Make a VM an introspector: its guest may map memory of VMs that are introspected.
    ///
    /// For a tool that runs in a VM of its own. Its guest's kernel needs a token for that, which the
    /// tool gets on its connection to the VM that it looks into. A VM stays an introspector until it
    /// ends, or --off is said. With neither option, tells which it is.
    Introspector(Introspector),
    /// List the tasks of a Linux guest.
    ///
    /// Goes along the kernel's own list of processes, from init_task on, while the guest runs. Where a
    /// task's fields are is found by what Linux has in its first three tasks.
    Tasks(Tasks),
    /// Show what a tool that has a VM hooked has done so far.
    ///
    /// Does not hook the VM itself.
    Stats(Stats),
    /// Hook a VM to a tool that listens on a socket.
    ///
    /// Plays the part of a VMM that knows introspection: connects to the tool, shakes hands, hooks
    /// the VM, and waits until the tool hangs up, the VM ends or a signal comes.
    Attach(Attach),
}

/// Which VM; not needed if only one runs.
#[derive(Args, Clone, Debug, Default)]
#[group(skip)]
pub struct Selector {
    /// The VM of this process.
    #[arg(long, value_name = "PID", group = "vm", help_heading = "Which VM")]
    pub pid: Option<i32>,
    /// The VM with this UUID (QEMU's -uuid).
    #[arg(long, value_name = "UUID", group = "vm", help_heading = "Which VM")]
    pub uuid: Option<Uuid>,
    /// The VM with this name (QEMU's -name).
    #[arg(long, value_name = "NAME", group = "vm", help_heading = "Which VM")]
    pub name: Option<String>,
    /// Which one, in a process with several VMs: the number of its file descriptor there.
    #[arg(long, value_name = "N", help_heading = "Which VM")]
    pub vm_fd: Option<i32>,
}

/// Which VM, and how to get to it.
#[derive(Args, Clone, Debug, Default)]
#[group(skip)]
pub struct Reach {
    #[command(flatten)]
    pub vm: Selector,
    /// One that the host offers: wait until it does so (kvmictl attach) at this port or UNIX socket.
    #[arg(
        long,
        value_name = "vsock:PORT|PATH",
        group = "vm",
        conflicts_with = "vm_fd",
        help_heading = "Which VM"
    )]
    pub listen: Option<Listen>,
    /// File with the secret that the host wants this tool to know; a line feed at its end counts.
    #[arg(
        long,
        value_name = "FILE",
        requires = "listen",
        help_heading = "Which VM"
    )]
    pub tool_cookie_file: Option<PathBuf>,
}

/// Which VM, and by what way its memory is reached.
#[derive(Args, Clone, Debug, Default)]
#[group(skip)]
pub struct Source {
    #[command(flatten)]
    pub vm: Reach,
    /// Map the memory through /dev/kvmmem rather than have the host copy it: in a VM that its host
    /// has made an introspector.
    #[arg(long)]
    pub map: bool,
}

/// Where the names of the guest's kernel come from.
#[derive(Args, Clone, Debug, Default)]
#[group(skip)]
pub struct SymbolFile {
    /// Symbols of the guest's Linux kernel: its System.map, or its /proc/kallsyms as root reads it.
    #[arg(long = "symbols", value_name = "FILE", env = "KVMI_SYMBOLS")]
    pub file: Option<PathBuf>,
}

/// Arguments of `info`.
#[derive(Args, Debug)]
pub struct Info {
    #[command(flatten)]
    pub vm: Selector,
}

/// Arguments of `stats`.
#[derive(Args, Debug)]
pub struct Stats {
    #[command(flatten)]
    pub vm: Selector,
}

/// Arguments of `introspector`.
#[derive(Args, Debug)]
pub struct Introspector {
    #[command(flatten)]
    pub vm: Selector,
    /// Allow it.
    #[arg(long, conflicts_with = "off")]
    pub on: bool,
    /// Forbid it again; what is mapped is not any more.
    #[arg(long)]
    pub off: bool,
}

impl Introspector {
    /// What it shall be, if that is to be changed.
    pub fn wanted(&self) -> Option<bool> {
        (self.on || self.off).then_some(self.on)
    }
}

/// How memory is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Addresses, hexadecimal numbers and characters.
    Hex,
    /// The bytes as they are.
    Raw,
    /// Characters only, others than ASCII as dots.
    Text,
}

/// Arguments of `read`.
#[derive(Args, Debug)]
pub struct Read {
    #[command(flatten)]
    pub source: Source,
    /// First guest physical address, such as 0x100000 or 1M; with --virtual also a symbol.
    pub address: Address,
    /// Number of bytes, such as 64, 0x40 or 4K.
    #[arg(value_parser = number::parse)]
    pub len: u64,
    /// The address is a virtual one. The VM is paused meanwhile, lest the mapping changes.
    #[arg(long = "virtual")]
    pub is_virtual: bool,
    /// The vCPU whose virtual address it is.
    #[arg(long, value_name = "N", default_value = "0", requires = "is_virtual")]
    pub vcpu: u16,
    #[command(flatten)]
    pub symbols: SymbolFile,
    /// How to print them.
    #[arg(long, value_enum, default_value_t = Format::Hex)]
    pub format: Format,
}

/// Arguments of `write`.
#[derive(Args, Debug)]
pub struct Write {
    #[command(flatten)]
    pub source: Source,
    /// First guest physical address, such as 0x100000 or 1M.
    #[arg(value_parser = number::parse)]
    pub gpa: u64,
    #[command(flatten)]
    pub data: Data,
}

/// What `write` writes.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct Data {
    /// Write these bytes, such as "90 90 c3".
    #[arg(long, value_name = "BYTES", value_parser = number::parse_hex)]
    pub hex: Option<Bytes>,
    /// Write this text, without anything behind it.
    #[arg(long, value_name = "TEXT", value_parser = number::parse_text)]
    pub text: Option<Bytes>,
    /// Write the contents of this file ("-" is the standard input).
    #[arg(long)]
    pub file: Option<PathBuf>,
}

/// Bytes, one or more. (A type of its own, since an argument of type `Vec` is taken for a list.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

/// A range of guest memory.
#[derive(Args, Debug)]
#[group(skip)]
pub struct Range {
    /// First guest physical address.
    #[arg(long, value_name = "GPA", default_value = "0", value_parser = number::parse)]
    pub from: u64,
    /// Guest physical address to stop before; by default the end of the guest's memory.
    #[arg(long, value_name = "GPA", value_parser = number::parse)]
    pub to: Option<u64>,
}

/// Arguments of `dump`.
#[derive(Args, Debug)]
pub struct Dump {
    #[command(flatten)]
    pub source: Source,
    /// File to write.
    pub file: PathBuf,
    #[command(flatten)]
    pub range: Range,
}

/// Arguments of `find`.
#[derive(Args, Debug)]
pub struct Find {
    #[command(flatten)]
    pub source: Source,
    /// Text to search for.
    pub pattern: String,
    /// The pattern is bytes in hexadecimal, such as "7f 45 4c 46".
    #[arg(long)]
    pub hex: bool,
    /// Stop after so many occurrences.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max: Option<u64>,
    #[command(flatten)]
    pub range: Range,
}

/// Arguments of `tasks`.
#[derive(Args, Debug)]
pub struct Tasks {
    #[command(flatten)]
    pub source: Source,
    #[command(flatten)]
    pub symbols: SymbolFile,
}

/// Arguments of `attach`.
#[derive(Args, Debug)]
pub struct Attach {
    #[command(flatten)]
    pub vm: Selector,
    #[command(flatten)]
    pub tool: Tool,
    /// Commands that the tool may give: names, "all" or "none".
    #[arg(long, value_name = "LIST", default_value = "all", value_parser = allow::parse::<Kvmi>)]
    pub allow_commands: Allowed<Kvmi>,
    /// Events that the tool may get: names, "all" or "none".
    #[arg(long, value_name = "LIST", default_value = "all", value_parser = allow::parse::<EventId>)]
    pub allow_events: Allowed<EventId>,
    /// File with the secret that the tool has to know; a line feed at its end counts.
    #[arg(long, value_name = "FILE")]
    pub cookie_file: Option<PathBuf>,
    /// How long the tool may take to shake hands, in seconds.
    #[arg(long, value_name = "S", default_value = "10", value_parser = number::parse_seconds)]
    pub handshake_timeout: Duration,
    /// How long the tool may take to hang up when told that the VM is unhooked, in seconds.
    #[arg(long, value_name = "S", default_value = "60", value_parser = number::parse_seconds)]
    pub unhook_timeout: Duration,
}

/// Where the tool listens.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct Tool {
    /// The tool listens on this UNIX socket.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The tool listens on this vsock address.
    #[arg(long, value_name = "CID:PORT", value_parser = number::parse_vsock)]
    pub vsock: Option<(u32, u32)>,
}

#[cfg(test)]
mod tests;
