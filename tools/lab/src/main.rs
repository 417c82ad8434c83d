// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Runs commands on an emulated KVM host: the patched kernel under QEMU or Bochs.

mod bochs;
mod host;
mod klog;
mod ktap;
mod qemu;
mod session;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use host::{Host, MachineKind};
use qemu::Accel;
use session::{Ending, Outcome};

/// How often a stalled emulator is started anew.
const RERUNS: u32 = 2;

/// Runs commands on an emulated KVM host.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Opens a shell on the host.
    Shell(HostArgs),
    /// Runs one command on the host and exits with its exit status.
    Run(RunArgs),
}

#[derive(Args)]
struct HostArgs {
    /// Which build of the kernel to boot.
    #[arg(long, default_value = "lab", env = "FLAVOUR")]
    flavour: String,
    /// Folder of the builds and logs; its parent is the working directory on the host.
    #[arg(long, default_value = "build")]
    build: PathBuf,
    /// What emulates the host.
    #[arg(long, value_enum, default_value = "qemu")]
    machine: MachineKind,
    /// What runs the host's instructions under QEMU.
    #[arg(long, value_enum, default_value = "auto", env = "LAB_ACCEL")]
    accel: Accel,
    /// Has the host's clocks count executed instructions, one per nanosecond: slow, and exact; QEMU.
    #[arg(long)]
    icount: bool,
    /// Number of CPUs of the host; by default 3 under QEMU, of which VMs use 2, and 1 under Bochs.
    #[arg(long, value_name = "N")]
    cpus: Option<u8>,
    /// CPU model, of those that QEMU's -cpu or Bochs' cpu: takes; by default the richest that works.
    #[arg(long)]
    model: Option<String>,
    /// Memory of the host in MiB; debug kernels need more than others.
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// One more argument for the kernel, for instance kvm-intel.ept=0; may be repeated.
    #[arg(long, value_name = "WORD")]
    append: Vec<String>,
    /// List of more files and folders that the host has under the same names, one a line.  Bochs
    /// only: under QEMU it has all of the machine's.
    #[arg(long, value_name = "LIST")]
    files: Option<PathBuf>,
}

#[derive(Args)]
struct RunArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Name of the kernel's log, BUILD/lab/FLAVOUR-NAME.log.
    #[arg(long, default_value = "run")]
    name: String,
    /// Seconds after which the host is stopped and the run has failed.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Seconds without a sign of life after which the emulator counts as stalled.
    #[arg(long, default_value_t = 90)]
    stall: u64,
    /// Reads the command's output as KTAP and closes with the sums.
    #[arg(long)]
    ktap: bool,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    argv: Vec<String>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Shell(args) => shell(&args),
        Command::Run(args) => run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("lab: {error:#}");
        ExitCode::FAILURE
    })
}

fn shell(args: &HostArgs) -> Result<ExitCode> {
    let host = Host::new(args)?;
    session::interactive(&host)?;
    Ok(ExitCode::SUCCESS)
}

fn run(args: &RunArgs) -> Result<ExitCode> {
    let host = Host::new(&args.host)?;
    let logs = host.logs()?;
    let (outcome, mut sums) = run_unstalled(&host, args)?;
    let log = logs.join(format!("{}-{}.log", host.flavour, args.name));
    outcome.save_log(&log)?;
    let status = match outcome.ending {
        Ending::Exited(status) => status,
        Ending::Died => {
            if let Some(words) = host.last_words(&outcome.dir) {
                eprintln!("lab: {words}");
            }
            complain(&format!("the host went down; log: {}", log.display()), 1)
        }
        Ending::Stalled => complain(&format!("no re-run left; log: {}", log.display()), 1),
        Ending::TimedOut => complain(
            &format!("stopped after {} s; log: {}", args.timeout, log.display()),
            124,
        ),
        Ending::Interrupted => return Ok(ExitCode::from(130)),
    };
    let clean = klog::check(&log)?;
    if !args.ktap {
        return Ok(ExitCode::from(if clean { status } else { status.max(1) }));
    }
    sums.result(clean, "the kernel logged no report");
    if status != 0 && sums.failed() == 0 {
        sums.result(false, "the tests ended by themselves");
    }
    println!("{sums}");
    Ok(ExitCode::from(u8::from(sums.failed() != 0)))
}

/// Runs the command; starts over when the emulator stalls, and only then.
fn run_unstalled(host: &Host, args: &RunArgs) -> Result<(Outcome, ktap::Sums)> {
    let limits = session::Limits {
        total: Duration::from_secs(args.timeout),
        stall: Duration::from_secs(args.stall),
    };
    let mut rerun = 0;
    loop {
        let mut sums = ktap::Sums::default();
        let outcome = session::run(host, &args.argv, &limits, |line| {
            println!("{line}");
            sums.line(line);
        })?;
        // A kernel that has reported something did not stand still because of the emulator.
        let stalled = outcome.ending == Ending::Stalled && klog::check(&outcome.log())?;
        if !stalled || rerun == RERUNS {
            return Ok((outcome, sums));
        }
        rerun += 1;
        println!("lab: emulator stalled, re-run {rerun} of {RERUNS}");
    }
}

fn complain(message: &str, status: u8) -> u8 {
    eprintln!("lab: {message}");
    status
}
