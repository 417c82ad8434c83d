// SPDX-License-Identifier: GPL-2.0 OR MIT

//! QEMU as the host machine: the machine's own root file system below it, over 9p.

use std::fs::{self, OpenOptions};
use std::process::Command;

use anyhow::{ensure, Result};
use clap::ValueEnum;
use rustix::process::Pid;

use crate::host::{Host, Job, Machine, RunDir, KERNEL_ARGUMENTS};

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

/// QEMU with what runs the host's instructions, settled.
pub struct Qemu {
    accel: Accel,
    icount: bool,
}

impl Qemu {
    /// Finds out what [`Accel::Auto`] means on this machine.
    pub fn new(accel: Accel, icount: bool) -> Result<Self> {
        ensure!(
            !icount || accel != Accel::Kvm,
            "only QEMU's emulation can count instructions: not '--accel kvm'"
        );
        let accel = match accel {
            _ if icount => Accel::Tcg,
            Accel::Auto if nested_kvm() => Accel::Kvm,
            Accel::Auto => Accel::Tcg,
            chosen => chosen,
        };
        Ok(Self { accel, icount })
    }
}

impl Machine for Qemu {
    fn init(&self) -> &'static str {
        include_str!("../guest/init-qemu")
    }

    fn prepare(&self, host: &Host, dir: &RunDir, job: &Job<'_>) -> Result<Command> {
        // One CPU more than what runs VMs uses: see guest/init-qemu.
        let cpus = host.cpus.unwrap_or(3);
        ensure!(
            cpus >= 2,
            "QEMU needs --cpus 2 or more: no VM runs on the first one"
        );
        let memory = host
            .memory
            .unwrap_or(if host.flavour == "debug" { 6144 } else { 4096 });
        let (accel, model) = match self.accel {
            Accel::Kvm => ("kvm", "host"),
            // Instructions are counted while one CPU at a time runs.
            _ if self.icount => ("tcg,thread=single", "max"),
            _ => ("tcg,thread=multi", "max"),
        };
        let model = host.model.as_deref().unwrap_or(model);
        let mut qemu = Command::new(QEMU);
        qemu.args(["-accel", accel, "-cpu", model]);
        if self.icount {
            // Idle time passes at once.
            qemu.args(["-icount", "shift=0,sleep=off"]);
        }
        // The default machine computes its interrupt routing in ACPI byte code, which on a debug
        // kernel takes longer than the 30 s that the kernel allows; this one has a table.
        qemu.args(["-machine", "q35"]);
        qemu.args(["-smp", &cpus.to_string(), "-m", &memory.to_string()]);
        qemu.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        qemu.arg("-serial")
            .arg(format!("file:{}", dir.serial().display()));
        qemu.arg("-kernel").arg(&host.kernel);
        // A page of 1 GiB can only be had at boot; tests map a guest's memory by it.
        // The kernel's check of its timer panics if a busy machine lets the emulator wait meanwhile.
        qemu.arg("-append").arg(format!(
            "console=ttyS0 {} hugepagesz=1G hugepages=1 no_timer_check tsc=reliable i8042.noaux i8042.nokbd root=machine rootfstype=9p ro \
             rootflags=trans=virtio,version=9p2000.L,cache=loose,msize=262144 init={} {}",
            KERNEL_ARGUMENTS.join(" "),
            dir.init().display(),
            host.append.join(" ")
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
            Job::Command(_) => {
                qemu.arg("-chardev")
                    .arg(format!("file,id=out,path={}", dir.out().display()));
                qemu.args(["-device", "virtserialport,chardev=out,name=lab.out"]);
            }
            Job::Shell { .. } => {
                qemu.args(["-chardev", "stdio,id=out,signal=off"]);
                qemu.args(["-device", "virtconsole,chardev=out"]);
            }
        }
        Ok(qemu)
    }

    fn attend(&self, _emulator: Pid) {}

    fn last_words(&self, _dir: &RunDir) -> Option<String> {
        None // It has said them on standard error.
    }
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
