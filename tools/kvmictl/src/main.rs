// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl`: looks into running KVM guests.

mod access;
mod address;
mod allow;
mod area;
mod attach;
mod bits;
mod breakpoints;
mod cli;
mod cpuid;
mod dump;
mod exception;
mod find;
mod guard;
mod hexdump;
mod info;
mod inject;
mod instruction;
mod introspector;
mod list;
mod listen;
mod memory;
mod msr;
mod number;
mod output;
mod pause;
mod problem;
mod progress;
mod read;
mod regs;
mod scanner;
mod select;
mod serve;
mod session;
mod state;
mod stats;
mod step;
mod stepper;
mod symbols;
mod table;
mod tasks;
mod top;
mod trace;
mod translate;
mod wait;
mod write;

use std::process::ExitCode;

use clap::Parser as _;

use cli::{Cli, Command};
use output::Output;

fn main() -> ExitCode {
    // A wrong command line ends here, with status 2.
    let cli = Cli::parse();
    let mut output = Output::new(cli.json);
    let done = run(&cli.command, &mut output).and_then(|()| Ok(output.flush()?));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads the output has seen enough.
        Err(error) if problem::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // What was printed before the error belongs before it.
            let _ = output.flush();
            problem::report(&error, cli.json);
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command, output: &mut Output) -> anyhow::Result<()> {
    match command {
        Command::List => list::run(output),
        Command::Info(arguments) => info::run(arguments, output),
        Command::Read(arguments) => read::run(arguments, output),
        Command::Write(arguments) => write::run(arguments, output),
        Command::Dump(arguments) => dump::run(arguments, output),
        Command::Find(arguments) => find::run(arguments, output),
        Command::Pause(arguments) => pause::run(arguments, output),
        Command::Regs(arguments) => regs::run(arguments, output),
        Command::Cpuid(arguments) => cpuid::run(arguments, output),
        Command::Translate(arguments) => translate::run(arguments, output),
        Command::Inject(arguments) => inject::run(arguments, output),
        Command::Top(arguments) => top::run(arguments, output),
        Command::Guard(arguments) => guard::run(arguments, output),
        Command::Watch(arguments) => guard::watch(arguments, output),
        Command::Trace(arguments) => trace::run(arguments, output),
        Command::Break(arguments) => breakpoints::run(arguments, output),
        Command::Step(arguments) => step::run(arguments, output),
        Command::Access(arguments) => access::run(arguments, output),
        Command::Introspector(arguments) => introspector::run(arguments, output),
        Command::Tasks(arguments) => tasks::run(arguments, output),
        Command::Stats(arguments) => stats::run(arguments, output),
        Command::Attach(arguments) => attach::run(arguments, output),
    }
}
