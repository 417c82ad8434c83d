// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl dump`

use std::{
    fs::{File, OpenOptions, Permissions},
    os::{
        fd::AsFd,
        unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    time::Instant,
};

use anyhow::{Context as _, Result};
use indicatif::ProgressBar;
use kvmi_client::Connection;
use serde::Serialize;

use crate::{
    cli::Dump,
    memory::{self, scan, Via},
    output::{gpa, size, Output},
    progress,
};

/// What is printed in the end.
#[derive(Serialize)]
struct Summary {
    file: String,
    from: String,
    to: String,
    bytes_saved: u64,
    bytes_absent: u64,
    seconds: f64,
}

/// Saves guest memory to a file.
pub fn run(arguments: &Dump, output: &mut Output) -> Result<()> {
    let (via, mut session) = memory::open(&arguments.source)?;
    let (start, len) = session.resolve(&arguments.range)?;
    let path = arguments.file.display();
    let file = create(arguments, len).with_context(|| format!("cannot create {path}"))?;

    let begun = Instant::now();
    let parts = session.memory(start, len);
    let bar = progress::bar(parts.iter().map(|(_, len)| len).sum(), output.is_json());
    let saved = parts
        .into_iter()
        .map(|part| save(&mut session.vm, &via, part, start, &file, &bar))
        .sum::<Result<u64>>()
        .with_context(|| format!("cannot save to {path} all there is"))?;
    bar.finish_and_clear();
    session.close()?;

    let summary = Summary {
        file: path.to_string(),
        from: gpa(start),
        to: gpa(start.saturating_add(len)),
        bytes_saved: saved,
        bytes_absent: len - saved,
        seconds: begun.elapsed().as_secs_f64(),
    };
    if output.is_json() {
        return Ok(output.json(&summary)?);
    }
    let mut line = format!(
        "saved {} from {} to {} in {:.1} s to {path}",
        size(saved),
        summary.from,
        summary.to,
        summary.seconds
    );
    if summary.bytes_absent > 0 {
        line += &format!(" ({} without memory are holes)", size(summary.bytes_absent));
    }
    Ok(output.line(line)?)
}

/// Creates the file at its final size. The memory of a guest is nobody else's business, even if the
/// file was there before.
fn create(arguments: &Dump, len: u64) -> std::io::Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&arguments.file)?;
    // Devices and pipes keep what they have.
    if file.metadata()?.is_file() {
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.set_len(len)?;
    }
    Ok(file)
}

/// Saves `len` bytes at `start` to a file that begins at `first`, and returns how many of them the
/// guest has.
fn save<S: AsFd>(
    vm: &mut Connection<S>,
    via: &Via,
    (start, len): (u64, u64),
    first: u64,
    file: &File,
    bar: &ProgressBar,
) -> Result<u64> {
    let mut saved = 0;
    scan(vm, via, start, len, |page| {
        if let Some(bytes) = page.bytes {
            file.write_all_at(bytes, page.gpa - first)
                .context("cannot write to the file")?;
            saved += page.len;
        }
        bar.inc(page.len);
        Ok(true)
    })?;
    Ok(saved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::with_vm;

    #[test]
    fn file_has_the_memory_at_its_place_and_zeros_elsewhere() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(0x4000).unwrap();
        let saved = with_vm(&[7; 0x2000], |vm| {
            save(
                vm,
                &Via::Commands,
                (0, 0x4000),
                0,
                file.as_file(),
                &ProgressBar::hidden(),
            )
        });
        assert_eq!(saved.unwrap(), 0x2000);
        let mut expected = vec![0; 0x4000];
        expected[0x1000..0x3000].fill(7);
        assert_eq!(std::fs::read(file.path()).unwrap(), expected);
    }
}
