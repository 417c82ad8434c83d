// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Looks for reports in a kernel's log.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// What a kernel prints when one of its checks found something.
const REPORTS: &[&str] = &[
    "WARNING:",
    "BUG:",
    "KASAN:",
    "UBSAN:",
    "ODEBUG:",
    "Oops",
    "Call Trace",
    "Kernel panic",
    "general protection fault",
    "INFO: possible",
    "possible circular locking",
    "inconsistent lock state",
    "suspicious RCU usage",
    "sleeping function called",
    "blocked for more than",
    "soft lockup",
    "self-detected stall",
    "detected stalls",
    "kmemleak: unreferenced object",
    "new suspected memory leaks",
    // KUnit's: the tests of the kernel's side run when a module is loaded.
    "] not ok ",
    "]     not ok ",
];

/// How much of the log is shown from a report on.
const CONTEXT: usize = 40;

/// The index of the first report.
fn first_report(lines: &[&str]) -> Option<usize> {
    lines
        .iter()
        .position(|line| REPORTS.iter().any(|report| line.contains(report)))
}

/// Prints the first report in the log; returns whether there was none.
pub fn check(log: &Path) -> Result<bool> {
    let text = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let Some(first) = first_report(&lines) else {
        return Ok(true);
    };
    println!(
        "lab: the kernel reported (line {} of {}):",
        first + 1,
        log.display()
    );
    for line in lines.iter().skip(first).take(CONTEXT) {
        println!("# {line}");
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::first_report;

    #[test]
    fn finds_reports() {
        for line in [
            "[    1.0] WARNING: CPU: 1 PID: 1 at virt/kvm/kvm_main.c:1",
            "[    1.0] INFO: possible recursive locking detected",
            "[    1.0] BUG: KASAN: slab-use-after-free in f",
            "[    1.0] INFO: task sh:1 blocked for more than 60 seconds.",
            "[    1.0] kmemleak: unreferenced object 0xffff888003400000 (size 64):",
            "[    1.0]     not ok 2 thread_is_joined",
            "[    1.0] not ok 1 kvmi_host",
        ] {
            assert_eq!(
                first_report(&["[    0.0] Linux version", line]),
                Some(1),
                "{line}"
            );
        }
    }

    #[test]
    fn passes_ordinary_lines() {
        assert_eq!(
            first_report(&[
                "kmemleak: Kernel memory leak detector initialized",
                "kasan: ok"
            ]),
            None
        );
    }
}
