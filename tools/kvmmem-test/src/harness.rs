// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Runs the tests one by one, each in its own process, and reports in KTAP.

use std::{
    io::Read as _,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{kill_process_group, Pid, Signal};

use crate::{counters, fake, sys, EXIT_SKIP};

/// Hidden option: be the process of one test.
pub const RUN_ONE: &str = "--run-one";

/// How long a test may take, in an emulated guest of an emulated host.
const LIMIT: Duration = Duration::from_secs(300);

/// What to run and how.
pub struct Options {
    /// Substrings of which a test's name must have one; any name is fine if there are none.
    pub filters: Vec<String>,
    /// The port to the host.
    pub host: Option<PathBuf>,
    /// Rounds of long loops.
    pub rounds: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            filters: Vec::new(),
            host: None,
            rounds: 200,
        }
    }
}

/// One test.
pub struct Test {
    area: &'static str,
    behaviour: &'static str,
    run: fn(&Options),
    needs_host: bool,
    needs_fake: bool,
}

impl Test {
    /// A test of `area` that fails by panicking.
    pub const fn new(area: &'static str, behaviour: &'static str, run: fn(&Options)) -> Self {
        Self {
            area,
            behaviour,
            run,
            needs_host: false,
            needs_fake: false,
        }
    }

    /// The test needs a host that maps pages.
    pub const fn needs_host(mut self) -> Self {
        self.needs_host = true;
        self
    }

    /// The test needs a module with a host built in.
    pub const fn needs_fake(mut self) -> Self {
        self.needs_fake = true;
        self
    }

    /// `area.behaviour`
    pub fn name(&self) -> String {
        format!("{}.{}", self.area, self.behaviour)
    }

    /// Runs it in this process.
    pub fn run(&self, options: &Options) {
        (self.run)(options);
    }
}

/// Makes a [`Test`] of a function, in the area named by the constant `AREA`.
macro_rules! test {
    ($function:ident) => {
        $crate::harness::Test::new(AREA, stringify!($function), $function)
    };
}
pub(crate) use test;

/// Runs those of `tests` that the options select.
pub fn run<'a>(tests: impl Iterator<Item = &'a Test>, options: &Options) -> ExitCode {
    println!("KTAP version 1");
    if let Err(error) = sys::open() {
        println!("1..0 # SKIP {}: {error}", sys::DEVICE);
        return EXIT_SKIP.into();
    }
    let selected = |test: &&Test| {
        let name = test.name();
        options.filters.is_empty() || options.filters.iter().any(|part| name.contains(part))
    };
    let tests: Vec<&Test> = tests.filter(selected).collect();
    println!("1..{}", tests.len());
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (number, test) in (1..).zip(tests) {
        let name = test.name();
        if test.needs_host && options.host.is_none() {
            skipped += 1;
            println!("ok {number} {name} # SKIP no host (--host)");
            continue;
        }
        if test.needs_fake && !fake::is_present() {
            skipped += 1;
            println!("ok {number} {name} # SKIP no host is built into the module");
            continue;
        }
        match run_one(test, options) {
            Ok(()) => {
                passed += 1;
                println!("ok {number} {name}");
            }
            Err(report) => {
                failed += 1;
                report.lines().for_each(|line| println!("# {line}"));
                println!("not ok {number} {name}");
            }
        }
    }
    println!("# Totals: pass:{passed} fail:{failed} xfail:0 xpass:0 skip:{skipped} error:0");
    match (passed, failed) {
        (_, 1..) => ExitCode::FAILURE,
        (0, 0) => EXIT_SKIP.into(),
        _ => ExitCode::SUCCESS,
    }
}

fn run_one(test: &Test, options: &Options) -> Result<(), String> {
    let mut command = Command::new("/proc/self/exe");
    command
        .args([RUN_ONE, &test.name()])
        .args(["--rounds", &options.rounds.to_string()]);
    if let Some(host) = &options.host {
        command.arg("--host").arg(host);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    let group = Pid::from_child(&child);
    let stderr = child.stderr.take();
    let output = thread::spawn(move || {
        let mut text = String::new();
        if let Some(mut stderr) = stderr {
            // What came before an error is as good as it gets.
            let _ = stderr.read_to_string(&mut text);
        }
        text
    });
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait().map_err(|error| error.to_string())? {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => break None,
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    // Also for processes that a finished test has left behind.
    let _ = kill_process_group(group, Signal::KILL);
    let Some(status) = status else {
        return Err(format!("no end after {} s", LIMIT.as_secs()));
    };
    let text = output.join().unwrap_or_default();
    if !status.success() {
        return Err(format!("{text}{status}"));
    }
    counters::expect_nothing_left().map_err(|left| format!("{text}left in the module: {left}"))?;
    fake::expect_content()
}
