// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What the module says that it has.

use std::{
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::fake;

const FILE: &str = "/sys/kernel/debug/kvmmem/counters";

/// One of the module's counters.
#[track_caller]
pub fn counter(name: &str) -> i64 {
    let text = fs::read_to_string(FILE).expect("debugfs is mounted, and the module is loaded");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no counter {name} in {text:?}"))
        .parse()
        .expect("a counter is a number")
}

/// Waits until nothing is in use, which takes a moment after a process was killed; returns what is.
pub fn expect_nothing_left() -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let text = fs::read_to_string(FILE).map_err(|error| format!("{FILE}: {error}"))?;
        let left: Vec<&str> = text
            .lines()
            .filter(|line| !line.ends_with(" 0"))
            // That is for good, and looked at together with the host's account.
            .filter(|line| !line.starts_with("quarantined ") || !fake::is_present())
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(left.join(", "));
        }
        sleep(Duration::from_millis(5));
    }
}
