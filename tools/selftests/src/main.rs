// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmi_test`: tests of the KVMI kernel part from user space, in the manner of kselftest.
//!
//! Every test runs in a process of its own with VMs of its own, so that one that hangs, dies or
//! leaves a VM hooked takes no other one with it. The result is KTAP on standard output.

use std::{process::ExitCode, time::Duration};

use harness::{Options, Test};
use tiny_vm::{guest, memory};

mod access;
mod access_delivery;
mod access_emulated;
mod access_end;
mod access_insns;
mod access_lost;
mod access_memory;
mod access_pv;
mod access_size;
mod access_stress;
mod access_tool;
mod address;
mod backlog;
mod commands;
mod descriptors;
mod device;
mod event_boot;
mod event_breakpoint;
mod event_code;
mod event_code_breakpoint;
mod event_common;
mod event_corpus;
mod event_cr;
mod event_cr_reply;
mod event_descriptor;
mod event_end;
mod event_hypercall;
mod event_msr;
mod event_msr_reply;
mod event_step;
mod event_step_delivery;
mod event_step_insns;
mod event_stress;
mod event_xsetbv;
mod framing;
mod fuzz;
mod fuzz_messages;
mod guests;
mod harness;
mod hook;
mod hotplug;
mod inject;
mod inject_modes;
mod jobs;
mod lifecycle;
mod mapping;
mod mapping_kill;
mod mapping_servants;
mod mapping_stress;
mod mapping_token;
mod mapping_tool;
mod masks;
mod pause;
mod physical;
mod registers;
mod reply;
mod role;
mod signals;
mod smm;
mod soak;
mod state;
mod status;
mod stress;
mod sys;
mod time_limit;
mod tool;
mod tracing;
mod trap;
mod util;
mod vcpu;
mod vcpu_fuzz;
mod vcpu_stress;
mod vcpu_tool;
mod vm;
mod xsave;

/// Process exit status for "nothing was tested", as kselftest has it.
const EXIT_SKIP: u8 = 4;

const USAGE: &str = "\
Usage: kvmi_test [OPTION]...
Tests KVM introspection; needs root, /dev/kvm and the module kvmi_host.

  --list              list the tests and exit
  --filter SUBSTR     run the tests whose names contain SUBSTR (may be repeated)
  --skip SUBSTR=WHY   skip those whose names contain SUBSTR (may be repeated)
  --stress SECONDS    run only the tests of everything at once, for so long each
  --seed N            seed of what is random (default: taken from the clock)
  --rounds-scale F    multiply the rounds of long loops by F, 0.01 for example
  --timeout-scale F   multiply the time limits by F, 5 for example on a slow kernel
  --skip-destructive  leave out the tests that kill processes, try to unload the
                      module, or send it garbage
  --without-module    run the tests for a kernel without the module, which are
                      left out otherwise; it must not be loaded

Exit status: 0 all passed, 1 something failed, 4 all skipped.";

/// Every test there is, in the order in which they run: the simple ones first.
fn registry() -> impl Iterator<Item = &'static Test> {
    [
        hook::TESTS,
        masks::TESTS,
        commands::TESTS,
        physical::TESTS,
        framing::TESTS,
        device::TESTS,
        status::TESTS,
        lifecycle::TESTS,
        guests::TESTS,
        jobs::TESTS,
        state::TESTS,
        registers::TESTS,
        xsave::TESTS,
        address::TESTS,
        pause::TESTS,
        reply::TESTS,
        inject::TESTS,
        inject_modes::TESTS,
        trap::TESTS,
        smm::TESTS,
        signals::TESTS,
        backlog::TESTS,
        mapping::TESTS,
        mapping_token::TESTS,
        mapping_stress::TESTS,
        mapping_kill::TESTS,
        descriptors::TESTS,
        time_limit::TESTS,
        hotplug::TESTS,
        tracing::TESTS,
        access::TESTS,
        access_end::TESTS,
        access_insns::TESTS,
        access_delivery::TESTS,
        access_emulated::TESTS,
        access_pv::TESTS,
        access_lost::TESTS,
        access_size::TESTS,
        access_memory::TESTS,
        access_stress::TESTS,
        event_cr::TESTS,
        event_cr_reply::TESTS,
        event_boot::TESTS,
        event_msr::TESTS,
        event_msr_reply::TESTS,
        event_xsetbv::TESTS,
        event_descriptor::TESTS,
        event_breakpoint::TESTS,
        event_code_breakpoint::TESTS,
        event_hypercall::TESTS,
        event_step::TESTS,
        event_step_insns::TESTS,
        event_step_delivery::TESTS,
        event_corpus::TESTS,
        event_stress::TESTS,
        event_end::TESTS,
        stress::TESTS,
        vcpu_stress::TESTS,
        soak::TESTS,
        fuzz::TESTS,
        vcpu_fuzz::TESTS,
    ]
    .into_iter()
    .flatten()
}

/// What the command line asks for.
enum Action {
    /// Run what the options select.
    Run,
    /// Name the tests.
    List,
    /// Explain the options.
    Help,
    /// Be the process of this one test.
    Single(String),
    /// Be a helper process of a test.
    Role(Vec<String>),
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<(Action, Options), String> {
    let mut action = Action::Run;
    let mut options = Options::default();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--list" => action = Action::List,
            "--help" | "-h" => action = Action::Help,
            "--filter" => options.filters.push(value()?),
            "--skip" => options.skips.push(skip(&value()?)?),
            "--stress" => {
                options.stress = Some(Duration::from_secs_f64(positive(&arg, &value()?)?));
            }
            "--seed" => options.seed = value()?.parse().map_err(|e| format!("--seed: {e}"))?,
            "--rounds-scale" => options.rounds_scale = positive(&arg, &value()?)?,
            "--timeout-scale" => options.timeout_scale = positive(&arg, &value()?)?,
            "--skip-destructive" => options.skip_destructive = true,
            "--without-module" => options.without_module = true,
            harness::RUN_ONE => action = Action::Single(value()?),
            role::ROLE => return Ok((Action::Role(args.collect()), options)),
            _ => return Err(format!("unknown option {arg}")),
        }
    }
    Ok((action, options))
}

fn skip(value: &str) -> Result<(String, String), String> {
    match value.split_once('=') {
        Some((part, why)) if !why.is_empty() => Ok((part.into(), why.into())),
        _ => Err(format!("--skip: {value} tells no reason")),
    }
}

fn positive(option: &str, value: &str) -> Result<f64, String> {
    match value.parse() {
        // Small enough to be seconds.
        Ok(number) if (f64::MIN_POSITIVE..1e9).contains(&number) => Ok(number),
        _ => Err(format!("{option}: {value} is not a positive number")),
    }
}

fn main() -> ExitCode {
    let (action, options) = match parse(std::env::args().skip(1)) {
        Ok(parsed) => parsed,
        Err(message) => {
            eprintln!("kvmi_test: {message}\n{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    match action {
        Action::Help => println!("{USAGE}"),
        Action::List => registry().for_each(|test| println!("{}", test.name())),
        Action::Single(name) => match registry().find(|test| test.name() == name) {
            Some(test) => harness::be_test(test, &options),
            None => {
                eprintln!("kvmi_test: no test {name}");
                return ExitCode::FAILURE;
            }
        },
        Action::Role(args) => role::be(&args),
        Action::Run => return harness::run(registry(), &options),
    }
    ExitCode::SUCCESS
}
