// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The host that is built into the module for tests: `tools/lab/guest/fakehost`.

use std::{fs, path::PathBuf};

use kvmi_abi::{
    mem::{MemMap, MemMapMany},
    token::MapToken,
};
use zerocopy::transmute;

use crate::counters::counter;

/// The first word of every good token.
const GOOD_TOKEN: u64 = 0x600d;

fn path(parameter: &str) -> PathBuf {
    PathBuf::from("/sys/module/kvmmem/parameters").join(format!("fake_{parameter}"))
}

/// Whether the module has one.
pub fn is_present() -> bool {
    path("foreign").exists()
}

/// One of its numbers.
#[track_caller]
pub fn get(parameter: &str) -> i64 {
    let text = fs::read_to_string(path(parameter)).expect("the module has a host built in");
    text.trim().parse().expect("a parameter is a number")
}

/// Changes one of its knobs.
#[track_caller]
pub fn set(parameter: &str, value: i64) {
    fs::write(path(parameter), value.to_string()).expect("a parameter can be changed");
}

/// Has mapping fail so many times.
#[track_caller]
pub fn fail_map(errno: i32, times: i64) {
    set("map_errors", times);
    set("map_error", errno.into());
}

/// Has unmapping fail for so many pages, after so many others.
#[track_caller]
pub fn fail_unmap(errno: i32, times: i64, after: i64) {
    set("unmap_after", after);
    set("unmap_errors", times);
    set("unmap_error", errno.into());
}

/// A new token.
#[track_caller]
pub fn token() -> MapToken {
    transmute!([GOOD_TOKEN, get("token") as u64, 0, 0])
}

/// A request that it grants.
#[track_caller]
pub fn request(gpa: u64, gva: usize) -> MemMap {
    MemMap {
        token: token(),
        gpa,
        gva: gva as u64,
    }
}

/// A request for many pages that it grants.
#[track_caller]
pub fn request_many(gpas: &[u64], gva: usize) -> MemMapMany {
    MemMapMany {
        token: token(),
        gva: gva as u64,
        gpas: gpas.as_ptr().addr() as u64,
        count: gpas.len() as u32,
        padding: 0,
    }
}

/// What it has to say when nothing is in use: pages that are another VM's are in quarantine, and
/// nobody has broken a rule.
pub fn expect_content() -> Result<(), String> {
    if !is_present() {
        return Ok(());
    }
    let (foreign, quarantined) = (get("foreign"), counter("quarantined"));
    let complaints = get("complaints");
    if foreign != quarantined || complaints != 0 {
        return Err(format!(
            "the host: {foreign} pages are foreign, {quarantined} quarantined, {complaints} complaints"
        ));
    }
    Ok(())
}
