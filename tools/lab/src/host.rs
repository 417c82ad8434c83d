// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The emulated host: its kernel, its scripts and the files of a run.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context, Result};
use clap::ValueEnum;
use rustix::process::Pid;

use crate::bochs::Bochs;
use crate::qemu::Qemu;
use crate::HostArgs;

/// PID 1 of the host, without what [`Host::write_scripts`] puts before it.
const INIT: &str = include_str!("../guest/init");

/// The kernel's arguments on any machine: what has to do with its log and its end.
pub const KERNEL_ARGUMENTS: [&str; 6] = [
    "loglevel=7",
    "printk.devkmsg=on",
    "panic=-1",
    "oops=panic",
    "kunit.enable=1",
    "kunit.autorun=1",
];

/// What emulates the host.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MachineKind {
    /// QEMU, which emulates AMD-V, or uses the machine's own KVM.
    Qemu,
    /// Bochs, which emulates Intel's VMX with EPT.
    Bochs,
}

/// An emulator and its settings.
pub trait Machine {
    /// Its part of the host's init.
    fn init(&self) -> &'static str;

    /// Prepares a run whose scripts are in `dir`; the command starts the emulator, which leaves
    /// its files in `dir` and ends when the host powers off.
    fn prepare(&self, host: &Host, dir: &RunDir, job: &Job<'_>) -> Result<Command>;

    /// Does what the emulator of a run needs while it runs.
    fn attend(&self, emulator: Pid);

    /// Why the emulator says that it ended, if it was not for the host's powering off.
    fn last_words(&self, dir: &RunDir) -> Option<String>;
}

/// An emulated host, ready to be started any number of times.
pub struct Host {
    /// The flavour of its kernel.
    pub flavour: String,
    /// The kernel's image.
    pub kernel: PathBuf,
    /// More arguments for the kernel.
    pub append: Vec<String>,
    /// Number of CPUs, if not the machine's default.
    pub cpus: Option<u8>,
    /// CPU model, if not the machine's default.
    pub model: Option<String>,
    /// Memory in MiB, if not the machine's default.
    pub memory: Option<u32>,
    /// List of more files that it has, if it does not see all of the machine's anyway.
    pub files: Option<PathBuf>,
    build: PathBuf,
    machine: Box<dyn Machine>,
}

/// What a host runs as its only job.
pub enum Job<'a> {
    /// A command, its output on a port.
    Command(&'a [String]),
    /// A shell on a terminal of the given type.
    Shell {
        /// The terminal's type, as in TERM.
        term: String,
        /// Rows and columns of the terminal.
        size: (u16, u16),
    },
}

/// Files of one run of a host, removed when it is over.
pub struct RunDir(tempfile::TempDir);

impl RunDir {
    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The host's init.
    pub fn init(&self) -> PathBuf {
        self.path().join("init")
    }

    /// What the init runs.
    pub fn command(&self) -> PathBuf {
        self.path().join("command")
    }

    /// The kernel's log.
    pub fn serial(&self) -> PathBuf {
        self.path().join("serial.log")
    }

    /// The command's output.
    pub fn out(&self) -> PathBuf {
        self.path().join("out")
    }

    /// Heartbeats and the exit status.
    pub fn status(&self) -> PathBuf {
        self.path().join("status")
    }
}

impl Host {
    /// Finds the kernel and settles what is to be found out about the machine.
    pub fn new(args: &HostArgs) -> Result<Self> {
        let build = fs::canonicalize(&args.build).with_context(|| {
            format!("no folder {}: build something first", args.build.display())
        })?;
        let kernel = build.join("kernel").join(&args.flavour).join("bzImage");
        ensure!(
            kernel.is_file(),
            "no {}: run 'make kernel FLAVOUR={}'",
            kernel.display(),
            args.flavour
        );
        ensure!(
            !build
                .to_string_lossy()
                .contains(|c: char| c.is_whitespace() || c == ','),
            "{}: a kernel's command line cannot hold white space, nor QEMU's options a comma",
            build.display()
        );
        let machine: Box<dyn Machine> = match args.machine {
            MachineKind::Qemu => Box::new(Qemu::new(args.accel, args.icount)?),
            MachineKind::Bochs => Box::new(Bochs),
        };
        let mut append = args.append.clone();
        if args.flavour == "debug" {
            // With five levels, KASAN asks for that CPU feature to know which addresses it has
            // shadow memory for, and reports a wild access if an interrupt comes while
            // identify_cpu() has cleared the features of the boot CPU.
            append.push("no5lvl".into());
        }
        Ok(Self {
            flavour: args.flavour.clone(),
            kernel,
            append,
            cpus: args.cpus,
            model: args.model.clone(),
            memory: args.memory,
            files: args.files.clone(),
            build,
            machine,
        })
    }

    /// The folder of the builds.
    pub fn build(&self) -> &Path {
        &self.build
    }

    /// The checkout that was built, which is the host's working directory.
    pub fn checkout(&self) -> &Path {
        self.build.parent().unwrap_or(&self.build)
    }

    /// The folder of the logs, which exists.
    pub fn logs(&self) -> Result<PathBuf> {
        let logs = self.build.join("lab");
        fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
        Ok(logs)
    }

    /// Prepares one run: its files and the emulator's command line.
    pub fn prepare(&self, job: &Job<'_>) -> Result<(RunDir, Command)> {
        let dir = RunDir(
            tempfile::Builder::new()
                .prefix("run-")
                .tempdir_in(self.logs()?)?,
        );
        self.write_scripts(&dir, job)?;
        // There before the emulator makes them, so that they can be followed from the start, and
        // read after the end of one that has made none.
        for file in [dir.serial(), dir.out(), dir.status()] {
            File::create(file)?;
        }
        let command = self.machine.prepare(self, &dir, job)?;
        Ok((dir, command))
    }

    /// Is told that the emulator of a run has been started.
    pub fn attend(&self, emulator: Pid) {
        self.machine.attend(emulator);
    }

    /// What the emulator of a run said about its end.
    pub fn last_words(&self, dir: &RunDir) -> Option<String> {
        self.machine.last_words(dir)
    }

    fn write_scripts(&self, dir: &RunDir, job: &Job<'_>) -> Result<()> {
        let (term, command) = match job {
            Job::Command(argv) => {
                let words: Vec<String> = argv.iter().map(|word| quote(word)).collect();
                (String::new(), format!("exec {}\n", words.join(" ")))
            }
            Job::Shell {
                term,
                size: (rows, columns),
            } => (
                term.clone(),
                format!("stty rows {rows} cols {columns} sane\nPS1='lab:\\w# ' exec bash --norc\n"),
            ),
        };
        fs::write(dir.command(), command)?;
        let mut init = File::create(dir.init())?;
        writeln!(
            init,
            "#!/bin/sh\nLAB_DIR={}\nLAB_CHECKOUT={}\nLAB_SHELL={}",
            quote(&dir.path().to_string_lossy()),
            quote(&self.checkout().to_string_lossy()),
            quote(&term)
        )?;
        init.write_all(self.machine.init().as_bytes())?;
        init.write_all(INIT.as_bytes())?;
        init.set_permissions(fs::Permissions::from_mode(0o755))?;
        Ok(())
    }
}

/// Quotes a word for the shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn quotes_for_the_shell() {
        assert_eq!(quote("it's $HOME"), r"'it'\''s $HOME'");
    }
}
