// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Bochs as the host machine, for Intel's VMX: its root is an initramfs with what the tests need.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use rustix::fs::{open, Mode, OFlags};
use rustix::process::Pid;

use crate::host::{Host, Job, Machine, RunDir, KERNEL_ARGUMENTS};

/// What the host finds under the checkout's name: files and whole folders.
const FILES: &str = include_str!("../guest/bochs-files");

/// Folders that the init mounts on, or that programs take for granted.
const FOLDERS: [&str; 9] = [
    "bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var/tmp",
];

/// Where a static busybox may be.
const BUSYBOX: [&str; 3] = ["/bin/busybox", "/usr/bin/busybox", "/usr/local/bin/busybox"];

/// Bochs, as `tools/build/bochs.sh` provides it in the folder of the builds.
pub struct Bochs;

impl Machine for Bochs {
    fn init(&self) -> &'static str {
        include_str!("../guest/init-bochs")
    }

    fn prepare(&self, host: &Host, dir: &RunDir, job: &Job<'_>) -> Result<Command> {
        let Job::Command(_) = job else {
            bail!("there is no shell on Bochs, whose ports take no input: use QEMU");
        };
        let bochs = host.build().join("bochs/run");
        ensure!(
            bochs.is_file(),
            "no {}: run 'tools/build/bochs.sh'",
            bochs.display()
        );
        let root = dir.path().join("root");
        fill(&root, host, dir)?;
        make_image(&root, host, dir)?;
        let mut command = Command::new(bochs);
        command.arg("-f").arg(dir.path().join("bochsrc"));
        // Its screen is of no interest, but needs a terminal that can be drawn on.
        command.env("TERM", "linux").stderr(Stdio::null());
        Ok(command)
    }

    /// Its display draws on a pseudo-terminal that it opens for itself.  Nobody looks at that, and
    /// once some 20 kB have piled up there, Bochs stands still: they are read and dropped.
    fn attend(&self, emulator: Pid) {
        thread::spawn(move || loop {
            match screen(emulator) {
                Ok(Some(mut screen)) => {
                    // Ends with an error when the emulator does.
                    let _ = io::copy(&mut screen, &mut io::sink());
                    break;
                }
                Ok(None) => thread::sleep(Duration::from_millis(50)),
                Err(_) => break, // it has ended
            }
        });
    }

    fn last_words(&self, dir: &RunDir) -> Option<String> {
        let log = fs::read(dir.path().join("bochs.log")).ok()?;
        String::from_utf8_lossy(&log)
            .lines()
            .find(|line| line.contains(">>PANIC<<"))
            .map(|line| format!("Bochs: {line}"))
    }
}

/// The other end of the pseudo-terminal that a process has opened, if it has by now.
fn screen(process: Pid) -> io::Result<Option<File>> {
    for entry in fs::read_dir(format!("/proc/{}/fdinfo", process.as_raw_nonzero()))? {
        // A descriptor may be closed between the two steps.
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        let index = info
            .lines()
            .find_map(|line| line.strip_prefix("tty-index:"));
        if let Some(index) = index {
            let name = format!("/dev/pts/{}", index.trim());
            let flags = OFlags::RDONLY | OFlags::NOCTTY | OFlags::CLOEXEC;
            return Ok(Some(File::from(open(name, flags, Mode::empty())?)));
        }
    }
    Ok(None)
}

/// Makes the folder that becomes the initramfs.
fn fill(root: &Path, host: &Host, dir: &RunDir) -> Result<()> {
    for folder in FOLDERS {
        fs::create_dir_all(root.join(folder))?;
    }
    let busybox = BUSYBOX
        .iter()
        .find(|path| Path::new(path).is_file())
        .context("no busybox: install a static one")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    symlink("busybox", root.join("bin/sh"))?;
    let checkout = host.checkout();
    let mut files = FILES.to_string();
    if let Some(list) = &host.files {
        files +=
            &fs::read_to_string(list).with_context(|| format!("cannot read {}", list.display()))?;
    }
    for line in files.lines() {
        let name = line.split('#').next().unwrap_or_default().trim();
        if !name.is_empty() {
            let path = checkout.join(name.replace("FLAVOUR", &host.flavour));
            // What has not been built is missed by who needs it, if anybody does.
            if path.exists() {
                copy(&path, &inside(root, &path)?)?;
            }
        }
    }
    for script in [dir.init(), dir.command()] {
        copy(&script, &inside(root, &script)?)?;
    }
    Ok(())
}

/// The place below `root` at which the host sees `path` under its own name.
fn inside(root: &Path, path: &Path) -> Result<PathBuf> {
    Ok(root.join(path.strip_prefix("/")?))
}

/// Copies a file, or a folder with all that is in it.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        for entry in fs::read_dir(from)? {
            let name = entry?.file_name();
            copy(&from.join(&name), &to.join(&name))?;
        }
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

/// Makes the boot medium and the configuration.
fn make_image(root: &Path, host: &Host, dir: &RunDir) -> Result<()> {
    let cpus = host.cpus.unwrap_or(1);
    ensure!(
        matches!(cpus, 1 | 2),
        "Bochs takes --cpus 1 or 2, not {cpus}: more are too slow"
    );
    let memory = host
        .memory
        .unwrap_or(if host.flavour == "debug" { 2048 } else { 512 });
    let mut image = Command::new(host.checkout().join("tools/build/bochs-image.sh"));
    image.args(["-c", &cpus.to_string(), "-s", &memory.to_string()]);
    if let Some(model) = &host.model {
        image.args(["-m", model]);
    }
    image.args([&host.kernel, root, dir.path()]);
    image.args(KERNEL_ARGUMENTS);
    image.arg(format!("rdinit={}", dir.init().display()));
    image.args(&host.append);
    let status = image
        .stdin(Stdio::null())
        .status()
        .context("cannot start bochs-image.sh")?;
    ensure!(status.success(), "no image for Bochs");
    // All of it is in the image now.
    fs::remove_dir_all(root)?;
    Ok(())
}
