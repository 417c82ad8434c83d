// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What is understood and what is refused.

use super::*;
use clap::{error::ErrorKind, CommandFactory as _};

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

fn refused(line: &str) -> ErrorKind {
    let error = parse(line).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{line}");
    error.kind()
}

#[test]
fn definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_is_understood() {
    for line in [
        "kvmictl list",
        "kvmictl --json list",
        "kvmictl list --json",
        "kvmictl info",
        "kvmictl info --uuid c9dcf1b0-3b5c-4a2e-9d0e-1f2a3b4c5d6e",
        "kvmictl info --name web --vm-fd 9",
        "kvmictl read --pid 7 0x1000 4K --format raw",
        "kvmictl read --virtual 0xffffffff81000000 64",
        "kvmictl read --virtual --vcpu 1 0xffffffff81000000 64 --name web",
        "kvmictl read --virtual linux_banner 64 --symbols System.map",
        "kvmictl write 1M --hex 90:90",
        "kvmictl write 1M --text hello",
        "kvmictl write 1M --file -",
        "kvmictl dump /tmp/x --from 1M --to 2M",
        "kvmictl find secret --max 3",
        "kvmictl find --hex 7f454c46",
        "kvmictl pause --pid 5",
        "kvmictl pause --for 0.5",
        "kvmictl regs",
        "kvmictl regs --vcpu 1 --msr lstar,0x10 --msr IA32_EFER",
        "kvmictl cpuid 7.1 --vcpu 3",
        "kvmictl translate 0xffffffff81000000",
        "kvmictl translate schedule+0x10 --symbols System.map",
        "kvmictl inject 14 --error-code 2 --address 0x1000",
        "kvmictl inject #UD --vcpu 1",
        "kvmictl top --interval 0.1 --count 3 --json",
        "kvmictl guard 0x1000",
        "kvmictl guard 1M..2M --deny wx --block --count 3 --for 0.5 --page-walks --json",
        "kvmictl guard _stext.._etext __start_rodata..__end_rodata --watch --symbols System.map",
        "kvmictl watch 0x1008 --size 8 --pid 5",
        "kvmictl watch init_uts_ns --symbols System.map --count 1",
        "kvmictl trace --cr 0,CR3 --cr 4 --msr LSTAR,EFER,0x174 --count 3 --for 0.5 --json",
        "kvmictl trace --xsetbv --descriptors --hypercall --breakpoint --vcpu 0,1 --summary",
        "kvmictl trace --cr 3 --value 0x1000 --rip schedule --symbols System.map --pid 5",
        "kvmictl trace --msr IA32_EFER --listen vsock:4711 --rip _stext.._etext",
        "kvmictl break 0xffffffff81000000 do_exit schedule+0x10 --symbols System.map",
        "kvmictl break do_exit --count 1 --for 2 --pid 5",
        "kvmictl step 10 --vcpu 1 --symbols System.map",
        "kvmictl access --pid 5",
        "kvmictl stats --pid 5",
        "kvmictl read --listen vsock:4711 --map 0 8",
        "kvmictl write --listen vsock:4711 --map 1M --text hello",
        "kvmictl tasks --listen vsock:4711 --map --symbols System.map",
        "kvmictl top --listen /run/tool --tool-cookie-file k",
        "kvmictl guard --listen vsock:4711 0x1000",
        "kvmictl attach --socket /run/tool",
        "kvmictl attach --vsock 3:4711 --pid 5 --allow-events none --cookie-file k",
    ] {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
}

#[test]
fn wrong_use_is_refused() {
    for line in [
        "kvmictl info --pid 1 --name x",
        "kvmictl read 0 8 --pid 1 --listen vsock:1",
        "kvmictl read 0 8 --vm-fd 9 --listen vsock:1",
        "kvmictl guard 0 --watch --block",
        "kvmictl write 0 --hex 90 --text x",
        "kvmictl attach --socket /x --vsock 1:2",
    ] {
        assert_eq!(refused(line), ErrorKind::ArgumentConflict, "{line}");
    }
    for line in [
        "kvmictl attach",
        "kvmictl write 0",
        "kvmictl read 0",
        "kvmictl trace",
        "kvmictl trace --summary",
        "kvmictl break",
        "kvmictl step",
    ] {
        assert_eq!(refused(line), ErrorKind::MissingRequiredArgument, "{line}");
    }
    for line in [
        "kvmictl read 0 1Q",
        "kvmictl translate 0xg",
        "kvmictl translate schedule+x",
        "kvmictl write 0 --hex 9",
        "kvmictl write 0 --hex=",
        "kvmictl guard 2..1",
        "kvmictl guard 1.._etext",
        "kvmictl guard 1 --deny s",
        "kvmictl guard 1 --deny -",
        "kvmictl watch 1 --size x",
        "kvmictl trace --cr 2",
        "kvmictl trace --cr 8",
        "kvmictl trace --msr 0x2000",
        "kvmictl trace --msr KVM_STEAL_TIME",
        "kvmictl trace --cr 3 --rip 2..1",
        "kvmictl break 0xg",
        "kvmictl step 0",
        "kvmictl info --uuid x",
        "kvmictl pause --for x",
        "kvmictl regs --vcpu 65536",
        "kvmictl regs --msr nothing",
        "kvmictl cpuid 1.2.3",
        "kvmictl inject 32",
        "kvmictl inject 14 --error-code 0x10000",
        "kvmictl read --listen vsock:x 0 8",
        "kvmictl attach --vsock 3",
        "kvmictl attach --socket x --allow-events PAGEFAULT",
        "kvmictl attach --socket x --handshake-timeout=-1",
    ] {
        assert_eq!(refused(line), ErrorKind::ValueValidation, "{line}");
    }
    let line = "kvmictl read --vcpu 1 0 1";
    assert_eq!(refused(line), ErrorKind::MissingRequiredArgument);
    refused("kvmictl find x --max 0");
    refused("kvmictl top --count 0");
    refused("kvmictl");
}
