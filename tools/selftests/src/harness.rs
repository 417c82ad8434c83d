// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Runs the tests one by one, each in its own process, and reports in KTAP.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    panic,
    process::{exit, Child, Command, ExitCode, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kvmi_abi::{ioctl::KVM_CAP_INTROSPECTION, wire::VERSION};
use rustix::process::{kill_process_group, Pid, Signal};

use crate::{
    sys,
    util::{set_slowness, Rng},
    vm::TestVm,
    EXIT_SKIP,
};

/// Hidden option: be the process of one test.
pub const RUN_ONE: &str = "--run-one";

/// Begins the line in which a test's process says why it skips the test.
const SKIP_MARK: &str = "\u{1}skip:";

/// How long a killed test may take to go away.
const DEATH: Duration = Duration::from_secs(15);

/// What to run and how.
pub struct Options {
    /// Substrings of which a test's name must have one; any name is fine if there are none.
    pub filters: Vec<String>,
    /// Substrings of the names of tests to skip, each with the reason.
    pub skips: Vec<(String, String)>,
    /// Seed of what is random.
    pub seed: u64,
    /// Factor on the rounds of long loops.
    pub rounds_scale: f64,
    /// Factor on the time limits.
    pub timeout_scale: f64,
    /// For how long to do everything at once, and nothing else.
    pub stress: Option<Duration>,
    /// Leave out destructive tests.
    pub skip_destructive: bool,
    /// Run the tests that need the module to be absent, and only those.
    pub without_module: bool,
}

impl Default for Options {
    fn default() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            filters: Vec::new(),
            skips: Vec::new(),
            seed: now.map_or(1, |since| u64::from(since.subsec_nanos()) ^ since.as_secs()),
            rounds_scale: 1.0,
            timeout_scale: 1.0,
            stress: None,
            skip_destructive: false,
            without_module: false,
        }
    }
}

/// What a test is told.
pub struct Ctx {
    seed: u64,
    rounds_scale: f64,
    stress: Option<Duration>,
}

impl Ctx {
    /// For how long to do what is done for `full` on a fast machine.
    pub fn duration(&self, full: Duration) -> Duration {
        let scaled = full.mul_f64(self.rounds_scale);
        self.stress.unwrap_or(scaled.max(Duration::from_secs(1)))
    }

    /// How often to do what is done `full` times on a fast machine: at least once.
    pub fn rounds(&self, full: u32) -> usize {
        ((f64::from(full) * self.rounds_scale) as usize).max(1)
    }

    /// The test's random numbers.
    pub fn rng(&self) -> Rng {
        Rng::new(self.seed)
    }

    /// The seed of those.
    pub fn seed(&self) -> u64 {
        self.seed
    }
}

/// One test.
pub struct Test {
    area: &'static str,
    behaviour: &'static str,
    run: fn(&Ctx),
    timeout: Duration,
    timed: bool,
    destructive: bool,
    without_module: bool,
}

impl Test {
    /// A test of `area` that fails by panicking.
    pub const fn new(area: &'static str, behaviour: &'static str, run: fn(&Ctx)) -> Self {
        Self {
            area,
            behaviour,
            run,
            timeout: Duration::from_secs(120),
            timed: false,
            destructive: false,
            without_module: false,
        }
    }

    /// The test may take up to 15 minutes.
    pub const fn long(mut self) -> Self {
        self.timeout = Duration::from_secs(900);
        self
    }

    /// The test lasts as long as it is told to.
    pub const fn timed(mut self) -> Self {
        self.timed = true;
        self.long()
    }

    /// The test kills processes, tries to unload the module or sends it garbage.
    pub const fn destructive(mut self) -> Self {
        self.destructive = true;
        self
    }

    /// The test needs a kernel that has the module, but not loaded.
    pub const fn without_module(mut self) -> Self {
        self.without_module = true;
        self
    }

    /// `area.behaviour`
    pub fn name(&self) -> String {
        format!("{}.{}", self.area, self.behaviour)
    }
}

/// Makes a [`Test`] of a function, in the area named by the constant `AREA`.
macro_rules! test {
    ($function:ident) => {
        $crate::harness::Test::new(AREA, stringify!($function), $function)
    };
}
pub(crate) use test;

/// Tells something about a test, for whoever reads the report.
macro_rules! note {
    ($($arg:tt)*) => { println!($($arg)*) };
}
pub(crate) use note;

/// Ends the process of a test that cannot be made here.
pub fn skip(reason: &str) -> ! {
    println!("{SKIP_MARK}{reason}");
    exit(EXIT_SKIP.into())
}

/// Lets a panic of any thread end the process at once, instead of leaving the others waiting.
pub fn die_on_panic() {
    panic::set_hook(Box::new(|info| {
        // Not println!, which panics if nobody listens.
        let _ = writeln!(io::stdout(), "{info}");
        exit(1)
    }));
}

/// The process of one test.
pub fn be_test(test: &Test, options: &Options) {
    die_on_panic();
    set_slowness(options.timeout_scale);
    (test.run)(&Ctx {
        seed: options.seed,
        rounds_scale: options.rounds_scale,
        stress: options.stress,
    });
}

/// How a test ended.
enum Outcome {
    Pass,
    Fail(String),
    Skip(String),
}

/// Runs those of `tests` that the options select.
pub fn run<'a>(tests: impl Iterator<Item = &'a Test>, options: &Options) -> ExitCode {
    println!("KTAP version 1");
    if let Err(reason) = prerequisites(options.without_module) {
        println!("1..0 # SKIP {reason}");
        return EXIT_SKIP.into();
    }
    let selected = |test: &&Test| {
        let name = test.name();
        let named = options.filters.iter().any(|part| name.contains(part));
        let named = named || options.filters.is_empty();
        let asked = options.stress.is_none() || test.timed;
        named && asked && test.without_module == options.without_module
    };
    let tests: Vec<&Test> = tests.filter(selected).collect();
    if tests.is_empty() {
        println!("1..0 # SKIP no test has such a name");
        return EXIT_SKIP.into();
    }

    println!("1..{}", tests.len());
    println!("# seed {}", options.seed);
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (number, test) in (1..).zip(tests) {
        let name = test.name();
        let skips = &mut options.skips.iter();
        let outcome = if let Some((_, why)) = skips.find(|(part, _)| name.contains(part)) {
            Outcome::Skip(why.clone())
        } else if test.destructive && options.skip_destructive {
            Outcome::Skip("destructive".into())
        } else {
            println!("# {name}");
            run_one(test, options)
        };
        match outcome {
            Outcome::Pass => {
                passed += 1;
                println!("ok {number} {name}");
            }
            Outcome::Fail(reason) => {
                failed += 1;
                println!("# {name}: {reason}");
                println!("not ok {number} {name}");
            }
            Outcome::Skip(reason) => {
                skipped += 1;
                println!("ok {number} {name} # SKIP {reason}");
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

/// Whether the machine is one that the tests are for; if not, what is missing.
fn prerequisites(without_module: bool) -> Result<(), String> {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Err(format!("/dev/kvm: {error}"));
    }
    let vm = TestVm::bare().map_err(|error| format!("no VM can be created: {error}"))?;
    let version = vm.capability(KVM_CAP_INTROSPECTION);
    // UNHOOK does nothing to a VM that is not hooked, so it is safe to try on any kernel.
    let unhook = sys::unhook(&vm);
    match (version, unhook) {
        (0, Err(sys::Errno::PERM)) if without_module => Ok(()),
        (0, Err(sys::Errno::PERM)) => Err("the module kvmi_host is not loaded".into()),
        (0, _) => Err("this kernel has no KVM introspection (KVM_CAP_INTROSPECTION is 0)".into()),
        _ if without_module => Err("the module kvmi_host is loaded".into()),
        (version, _) if u32::try_from(version) == Ok(VERSION) => Ok(()),
        (version, _) => Err(format!("KVM_CAP_INTROSPECTION is {version}, not {VERSION}")),
    }
}

fn run_one(test: &Test, options: &Options) -> Outcome {
    let timeout = test.timeout.mul_f64(options.timeout_scale) + options.stress.unwrap_or_default();
    let seconds = options.stress.map(|time| time.as_secs_f64().to_string());
    let stress = seconds.iter().flat_map(|seconds| ["--stress", seconds]);
    let spawned = Command::new("/proc/self/exe")
        .args([RUN_ONE, &test.name()])
        .args(["--seed", &options.seed.to_string()])
        .args(["--rounds-scale", &options.rounds_scale.to_string()])
        .args(["--timeout-scale", &options.timeout_scale.to_string()])
        .args(stress)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return Outcome::Fail(format!("cannot be started: {error}")),
    };
    let group = Pid::from_child(&child);
    let mut skip_reason = None;
    let status = relay(&mut child, Instant::now() + timeout, &mut skip_reason);
    if status.is_none() {
        println!("# it hangs: no end after {} s", timeout.as_secs());
        show_group(group);
    }
    // Also for helper processes that a finished test has left behind.
    let _ = kill_process_group(group, Signal::KILL);
    let Some(status) = status else {
        let deadline = Instant::now() + DEATH;
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
        return Outcome::Fail(match child.try_wait() {
            Ok(Some(_)) => "timed out, killed".into(),
            _ => "timed out, and cannot be killed".into(),
        });
    };
    match (status.code(), status.signal()) {
        (Some(0), _) => Outcome::Pass,
        (Some(code), _) if code == i32::from(EXIT_SKIP) => {
            Outcome::Skip(skip_reason.unwrap_or_default())
        }
        (Some(code), _) => Outcome::Fail(format!("exit status {code}")),
        (None, signal) => Outcome::Fail(format!("killed by signal {}", signal.unwrap_or(0))),
    }
}

/// Passes the lines of `child` on until it ends; `None` if it has not by the deadline.
fn relay(child: &mut Child, deadline: Instant, skip: &mut Option<String>) -> Option<ExitStatus> {
    let (sender, lines) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
    }
    loop {
        let more = relay_some(&lines, Duration::from_millis(100), skip);
        if let Ok(Some(status)) = child.try_wait() {
            // What is left of the output, unless another process keeps the pipe open.
            let end = Instant::now() + Duration::from_secs(1);
            while relay_some(&lines, Duration::from_millis(100), skip) && Instant::now() < end {}
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        if !more {
            // All output has been seen, and its end: the process is about to end, too.
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Passes one line on; returns whether there may be more.
fn relay_some(lines: &Receiver<String>, wait: Duration, skip: &mut Option<String>) -> bool {
    match lines.recv_timeout(wait) {
        Ok(line) => match line.strip_prefix(SKIP_MARK) {
            Some(reason) => *skip = Some(reason.into()),
            None => println!("# {line}"),
        },
        Err(RecvTimeoutError::Timeout) => {}
        Err(RecvTimeoutError::Disconnected) => return false,
    }
    true
}

/// Prints what every thread of a process group is doing.
fn show_group(group: Pid) {
    let Ok(processes) = fs::read_dir("/proc") else {
        return;
    };
    for process in processes.flatten() {
        let stat = fs::read_to_string(process.path().join("stat")).unwrap_or_default();
        // pid (comm) state ppid pgrp …
        let pgrp = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(2));
        if pgrp != Some(&group.as_raw_pid().to_string()) {
            continue;
        }
        let Ok(tasks) = fs::read_dir(process.path().join("task")) else {
            continue;
        };
        for task in tasks.flatten() {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            println!(
                "# thread {}: {}",
                task.path().display(),
                read("comm").trim()
            );
            for line in read("stack").lines() {
                println!("#   {line}");
            }
        }
    }
}
