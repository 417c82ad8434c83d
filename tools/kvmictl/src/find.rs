// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl find`

use std::os::fd::AsFd;

use anyhow::Result;
use kvmi_client::Connection;
use serde::Serialize;

use crate::{
    cli::Find,
    memory::{self, scan, Via},
    number,
    output::{gpa, Output},
    problem::Problem,
    progress,
    scanner::Scanner,
};

/// What is printed as JSON.
#[derive(Serialize)]
struct Found {
    /// Guest physical addresses.
    matches: Vec<String>,
    /// Whether there may be more.
    truncated: bool,
}

/// Searches guest memory.
pub fn run(arguments: &Find, output: &mut Output) -> Result<()> {
    let pattern = pattern(arguments)?;
    let (via, mut session) = memory::open(&arguments.source)?;
    let (start, len) = session.resolve(&arguments.range)?;
    let parts = session.memory(start, len);
    let bar = progress::bar(parts.iter().map(|(_, len)| len).sum(), output.is_json());
    let as_json = output.is_json();
    let mut matches = Vec::new();
    let count = search(
        &mut session.vm,
        &via,
        &parts,
        &pattern,
        arguments.max,
        |page| {
            bar.inc(page.len);
            matches.extend(page.hits.iter().copied().map(gpa));
            if !as_json && !matches.is_empty() {
                bar.suspend(|| print(&mut matches, output))?;
            }
            Ok(())
        },
    )?;
    bar.finish_and_clear();
    session.close()?;

    if output.is_json() {
        let truncated = arguments.max.is_some_and(|max| count >= max);
        output.json(&Found { matches, truncated })?;
    }
    Ok(())
}

/// What the search has done with a page.
struct Progress<'a> {
    /// Bytes searched.
    len: u64,
    /// Addresses of what was found.
    hits: &'a [u64],
}

/// Searches the `parts` of memory until `max` occurrences are found; tells `progress` of each page,
/// and returns the number of occurrences.
fn search<S: AsFd>(
    vm: &mut Connection<S>,
    via: &Via,
    parts: &[(u64, u64)],
    pattern: &[u8],
    max: Option<u64>,
    mut progress: impl FnMut(Progress<'_>) -> std::io::Result<()>,
) -> Result<u64> {
    let mut scanner = Scanner::new(pattern);
    let mut count = 0;
    let mut hits = Vec::new();
    for (start, len) in parts {
        scan(vm, via, *start, *len, |page| {
            hits.clear();
            let more = scanner.push(page.gpa, page.bytes.unwrap_or_default(), |hit| {
                hits.push(hit);
                count += 1;
                max.is_none_or(|max| count < max)
            });
            progress(Progress {
                len: page.len,
                hits: &hits,
            })?;
            Ok(more)
        })?;
        if max.is_some_and(|max| count >= max) {
            break;
        }
    }
    Ok(count)
}

/// Prints what was found so far, for all to see at once.
fn print(matches: &mut Vec<String>, output: &mut Output) -> std::io::Result<()> {
    for hit in matches.drain(..) {
        output.line(hit)?;
    }
    output.flush()
}

fn pattern(arguments: &Find) -> Result<Vec<u8>> {
    let parse = if arguments.hex {
        number::parse_hex
    } else {
        number::parse_text
    };
    parse(&arguments.pattern)
        .map(|bytes| bytes.0)
        .map_err(|error| {
            let what = format!("wrong pattern {:?}: {error}", arguments.pattern);
            Problem::new(what, "with --hex, give bytes such as \"7f 45 4c 46\"").into()
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::with_vm;

    fn find(memory: &[u8], pattern: &[u8], max: Option<u64>) -> Vec<u64> {
        let mut found = Vec::new();
        let count = with_vm(memory, |vm| {
            search(vm, &Via::Commands, &[(0, 0x5000)], pattern, max, |page| {
                found.extend(page.hits);
                Ok(())
            })
        });
        assert_eq!(count.unwrap(), found.len() as u64);
        found
    }

    #[test]
    fn occurrences_across_pages_are_found() {
        let mut memory = vec![0; 0x3000];
        for at in [0, 0xffe, 0x2ffc] {
            memory[at..at + 4].copy_from_slice(b"root");
        }
        let all = [0x1000, 0x1ffe, 0x3ffc];
        assert_eq!(find(&memory, b"root", None), all);
        assert_eq!(find(&memory, b"root", Some(2)), all[..2]);
        assert!(find(&memory, b"toor", None).is_empty());
    }
}
