// SPDX-License-Identifier: GPL-2.0 OR MIT

//! One run of the host: starts the emulator, watches it and ends it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{kill_process_group, set_parent_process_death_signal, Pid, Signal};
use rustix::termios::tcgetwinsize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::host::{Host, Job, RunDir};

/// How often a run is looked at.
const POLL: Duration = Duration::from_millis(50);

/// How long a run and its silences may last.
pub struct Limits {
    /// The whole run.
    pub total: Duration,
    /// Without output, kernel message or heartbeat.
    pub stall: Duration,
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// The command ended with this status.
    Exited(u8),
    /// The host ended before its command.
    Died,
    /// The host was stopped: no sign of life from the emulator.
    Stalled,
    /// The host was stopped: the run took too long.
    TimedOut,
    /// The host was stopped: a signal asked for it.
    Interrupted,
}

/// A run that is over.
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// Its files.
    pub dir: RunDir,
}

impl Outcome {
    /// The kernel's log so far.
    pub fn log(&self) -> PathBuf {
        self.dir.serial()
    }

    /// Keeps the kernel's log as the given file.
    pub fn save_log(&self, log: &Path) -> Result<()> {
        fs::rename(self.dir.serial(), log)
            .with_context(|| format!("cannot keep the kernel's log as {}", log.display()))
    }
}

/// An emulator that ends with this value.
struct Emulator(Child);

impl Emulator {
    /// Starts it so that it cannot outlive this process.
    fn start(mut command: Command) -> Result<Self> {
        // SAFETY: prctl() is a system call and safe between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let name = command.get_program().to_string_lossy().into_owned();
        Ok(Self(
            command
                .spawn()
                .with_context(|| format!("cannot start {name}"))?,
        ))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        if self.0.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        // Only a group of its own is ended as one: a shell's emulator is in ours.
        let pid = Pid::from_child(&self.0);
        if rustix::process::getpgid(Some(pid)).is_ok_and(|group| group == pid) {
            let _ = kill_process_group(pid, Signal::KILL);
        } else {
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

/// Boots the host with a shell on this terminal.
pub fn interactive(host: &Host) -> Result<()> {
    let size = tcgetwinsize(std::io::stdin()).context("a shell needs a terminal")?;
    let term = std::env::var("TERM").unwrap_or_else(|_| String::from("dumb"));
    let job = Job::Shell {
        term,
        size: (size.ws_row, size.ws_col),
    };
    let (_dir, command) = host.prepare(&job)?;
    let stop = stop_flag()?;
    let mut emulator = Emulator::start(command)?;
    while emulator.0.try_wait()?.is_none() && !stop.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Boots the host, runs `argv` there and hands each line of its output to `line`.
pub fn run(
    host: &Host,
    argv: &[String],
    limits: &Limits,
    mut line: impl FnMut(&str),
) -> Result<Outcome> {
    let (dir, mut command) = host.prepare(&Job::Command(argv))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0);
    let stop = stop_flag()?;
    let mut emulator = Emulator::start(command)?;
    host.attend(Pid::from_child(&emulator.0));
    let start = Instant::now();
    let mut output = Lines::new(&dir.out())?;
    let mut pulse = Pulse::new(&dir);
    let ending = loop {
        // Asked first: what is read then is all.
        let ended = emulator.0.try_wait()?.is_some();
        if output.read(&mut line)? {
            pulse.beat();
        }
        if ended {
            output.finish(&mut line);
            break exit_status(&dir.status()).map_or(Ending::Died, Ending::Exited);
        } else if stop.load(Ordering::Relaxed) {
            break Ending::Interrupted;
        } else if start.elapsed() > limits.total {
            break Ending::TimedOut;
        } else if pulse.silence() > limits.stall {
            break Ending::Stalled;
        }
        thread::sleep(POLL);
    };
    Ok(Outcome { ending, dir })
}

/// The lines of a file that grows.
struct Lines {
    file: File,
    /// What has no end of line yet.
    rest: Vec<u8>,
}

impl Lines {
    fn new(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self {
            file,
            rest: Vec::new(),
        })
    }

    /// Hands on the lines that have come since the last call; whether anything has.
    fn read(&mut self, line: &mut impl FnMut(&str)) -> Result<bool> {
        let count = self.file.read_to_end(&mut self.rest)?;
        if let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') {
            let rest = self.rest.split_off(end + 1);
            let whole = std::mem::replace(&mut self.rest, rest);
            String::from_utf8_lossy(&whole).lines().for_each(line);
        }
        Ok(count != 0)
    }

    /// Hands on a last line that has no end.
    fn finish(self, line: &mut impl FnMut(&str)) {
        if !self.rest.is_empty() {
            line(&String::from_utf8_lossy(&self.rest));
        }
    }
}

/// A flag that the usual signals set.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&flag))?;
    }
    Ok(flag)
}

/// Signs of life: output, kernel messages, heartbeats.
struct Pulse {
    files: [PathBuf; 2],
    seen: u64,
    last: Instant,
}

impl Pulse {
    fn new(dir: &RunDir) -> Self {
        Self {
            files: [dir.serial(), dir.status()],
            seen: 0,
            last: Instant::now(),
        }
    }

    fn beat(&mut self) {
        self.last = Instant::now();
    }

    /// How long the emulator has given no sign of life.
    fn silence(&mut self) -> Duration {
        let size = |file: &PathBuf| fs::metadata(file).map_or(0, |data| data.len());
        let seen = self.files.iter().map(size).sum();
        if seen != self.seen {
            self.seen = seen;
            self.beat();
        }
        self.last.elapsed()
    }
}

/// The status that the host's init wrote last, if it got that far.
fn exit_status(status: &Path) -> Option<u8> {
    let text = fs::read_to_string(status).ok()?;
    text.lines()
        .rev()
        .find_map(|line| line.strip_prefix("exit "))?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::{exit_status, Lines};

    #[test]
    fn follows_lines_of_a_growing_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut output = Lines::new(file.path()).unwrap();
        let mut seen = Vec::new();
        let mut line = |text: &str| seen.push(text.to_owned());
        assert!(!output.read(&mut line).unwrap());
        file.write_all(b"one\ntw").unwrap();
        assert!(output.read(&mut line).unwrap());
        file.write_all(b"o\r\n\nrest").unwrap();
        assert!(output.read(&mut line).unwrap());
        output.finish(&mut line);
        assert_eq!(seen, ["one", "two", "", "rest"]);
    }

    #[test]
    fn takes_the_status_that_was_written_last() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "alive\nalive\n").unwrap();
        assert_eq!(exit_status(file.path()), None);
        fs::write(file.path(), "alive\nexit 7\nalive\n").unwrap();
        assert_eq!(exit_status(file.path()), Some(7));
    }
}
