// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The emulated host: which kernel, which emulator, which devices.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context, Result};
use clap::ValueEnum;

use crate::HostArgs;

/// PID 1 of the host, without its interpreter line and variables.
const INIT: &str = include_str!("../guest/init");

/// The guests' emulator and the host's, one and the same.
const QEMU: &str = "qemu-system-x86_64";

/// What runs the host's instructions.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// KVM where it offers nested virtualisation, TCG elsewhere.
    Auto,
    /// The machine's own KVM.
    Kvm,
    /// QEMU's emulation, which has AMD-V.
    Tcg,
}

/// An emulated host, ready to be started any number of times.
pub struct Host {
    /// The flavour of its kernel.
    pub flavour: String,
    build: PathBuf,
    kernel: PathBuf,
    accel: Accel,
    icount: bool,
    memory: String,
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
    /// The kernel's log.
    pub fn serial(&self) -> PathBuf {
        self.0.path().join("serial.log")
    }

    /// Heartbeats and the exit status.
    pub fn status(&self) -> PathBuf {
        self.0.path().join("status")
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
        ensure!(
            !args.icount || args.accel != Accel::Kvm,
            "only QEMU's emulation can count instructions: not '--accel kvm'"
        );
        let accel = match args.accel {
            _ if args.icount => Accel::Tcg,
            Accel::Auto if nested_kvm() => Accel::Kvm,
            Accel::Auto => Accel::Tcg,
            chosen => chosen,
        };
        let memory = args
            .memory
            .clone()
            .unwrap_or_else(|| String::from(if args.flavour == "debug" { "6G" } else { "4G" }));
        Ok(Self {
            flavour: args.flavour.clone(),
            build,
            kernel,
            accel,
            icount: args.icount,
            memory,
        })
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
        self.write_scripts(dir.0.path(), job)?;
        let mut qemu = Command::new(QEMU);
        match self.accel {
            Accel::Kvm => qemu.args(["-accel", "kvm", "-cpu", "host"]),
            // Instructions are counted while one CPU at a time runs; idle time passes at once.
            _ if self.icount => qemu
                .args(["-accel", "tcg,thread=single", "-cpu", "max"])
                .args(["-icount", "shift=0,sleep=off"]),
            _ => qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max"]),
        };
        // The default machine computes its interrupt routing in ACPI byte code, which on a debug
        // kernel takes longer than the 30 s that the kernel allows; this one has a table.
        qemu.args(["-machine", "q35"]);
        // One CPU more than what runs VMs uses: see guest/init.
        qemu.args(["-machine", "q35", "-smp", "3", "-m", &self.memory]);
        qemu.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        qemu.arg("-serial")
            .arg(format!("file:{}", dir.serial().display()));
        qemu.arg("-kernel").arg(&self.kernel);
        // The kernel's check of its timer panics if a busy machine lets the emulator wait meanwhile.
        qemu.arg("-append").arg(format!(
            "console=ttyS0 loglevel=7 printk.devkmsg=on panic=-1 oops=panic tsc=reliable \
             no_timer_check kunit.enable=1 kunit.autorun=1 \
             i8042.noaux i8042.nokbd root=machine rootfstype=9p ro \
             rootflags=trans=virtio,version=9p2000.L,cache=loose,msize=262144 init={}/init",
            dir.0.path().display()
        ));
        qemu.args([
            "-fsdev",
            "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
        ]);
        qemu.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=machine"]);
        qemu.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        qemu.arg("-chardev")
            .arg(format!("file,id=status,path={}", dir.status().display()));
        qemu.args(["-device", "virtserialport,chardev=status,name=lab.status"]);
        match job {
            // Not "stdio": at the end of standard input it would hang up.
            Job::Command(_) => {
                qemu.args(["-chardev", "file,id=out,path=/dev/stdout"]);
                qemu.args(["-device", "virtserialport,chardev=out,name=lab.out"]);
            }
            Job::Shell { .. } => {
                qemu.args(["-chardev", "stdio,id=out,signal=off"]);
                qemu.args(["-device", "virtconsole,chardev=out"]);
            }
        }
        Ok((dir, qemu))
    }

    fn write_scripts(&self, dir: &Path, job: &Job<'_>) -> Result<()> {
        let checkout = self.build.parent().unwrap_or(&self.build);
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
        fs::write(dir.join("command"), command)?;
        let mut init = File::create(dir.join("init"))?;
        writeln!(
            init,
            "#!/bin/sh\nLAB_DIR={}\nLAB_CHECKOUT={}\nLAB_SHELL={}",
            quote(&dir.to_string_lossy()),
            quote(&checkout.to_string_lossy()),
            quote(&term)
        )?;
        init.write_all(INIT.as_bytes())?;
        init.set_permissions(fs::Permissions::from_mode(0o755))?;
        Ok(())
    }
}

/// Quotes a word for the shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Whether this machine's KVM can run a host that runs guests itself.
fn nested_kvm() -> bool {
    let on = |module: &str| {
        fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
    };
    (on("kvm_amd") || on("kvm_intel"))
        && OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn quotes_for_the_shell() {
        assert_eq!(quote("it's $HOME"), r"'it'\''s $HOME'");
    }
}
