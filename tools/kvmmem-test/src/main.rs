// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmmem_test`: tests of `/dev/kvmmem`, to be run in a guest that has the module.
//!
//! Every test runs in a process of its own, after which nothing of it may be left in the module.
//! The result is KTAP on standard output.
//!
//! Without support of the host, mapping has to fail, and all that comes before and after is
//! tested. With it (`--host`), mapping itself is. A module that has a host of its own built in
//! (`src/fake.rs`) shows what becomes of its records when pages are mapped, and when the host refuses.

use std::{path::PathBuf, process::ExitCode};

use harness::{Options, Test};

mod arguments;
mod counters;
mod fake;
mod harness;
mod host;
mod lifetime;
mod limits;
mod mapped;
mod mapping;
mod memory;
mod ownership;
mod races;
mod records;
mod refusal;
mod sys;

/// Process exit status for "nothing was tested", as kselftest has it.
const EXIT_SKIP: u8 = 4;

const USAGE: &str = "\
Usage: kvmmem_test [OPTION]...
Tests /dev/kvmmem; needs root, and the module kvmmem in a guest of KVM.

  --list           list the tests and exit
  --filter SUBSTR  run the tests whose names contain SUBSTR (may be repeated)
  --host FILE      talk to the host over this port, as src/host.rs says, and run
                   the tests of mapping, too
  --rounds N       rounds of long loops (default 200)

Exit status: 0 all passed, 1 something failed, 4 all skipped.";

/// Every test there is, in the order in which they run: the simple ones first.
fn registry() -> impl Iterator<Item = &'static Test> {
    [
        arguments::TESTS,
        mapping::TESTS,
        limits::TESTS,
        ownership::TESTS,
        lifetime::TESTS,
        races::TESTS,
        records::TESTS,
        refusal::TESTS,
        mapped::TESTS,
    ]
    .into_iter()
    .flatten()
}

/// What the command line asks for.
enum Action {
    Run,
    List,
    Help,
    Single(String),
    Role(String),
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
            "--host" => options.host = Some(PathBuf::from(value()?)),
            "--rounds" => {
                options.rounds = value()?.parse().map_err(|e| format!("--rounds: {e}"))?;
            }
            harness::RUN_ONE => action = Action::Single(value()?),
            ownership::ROLE => action = Action::Role(value()?),
            _ => return Err(format!("unknown option {arg}")),
        }
    }
    Ok((action, options))
}

fn main() -> ExitCode {
    let (action, options) = match parse(std::env::args().skip(1)) {
        Ok(parsed) => parsed,
        Err(message) => {
            eprintln!("kvmmem_test: {message}\n{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    match action {
        Action::Help => println!("{USAGE}"),
        Action::List => registry().for_each(|test| println!("{}", test.name())),
        Action::Single(name) => match registry().find(|test| test.name() == name) {
            Some(test) => test.run(&options),
            None => {
                eprintln!("kvmmem_test: no test {name}");
                return ExitCode::FAILURE;
            }
        },
        Action::Role(role) => ownership::be(&role),
        Action::Run => return harness::run(registry(), &options),
    }
    ExitCode::SUCCESS
}
