// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl write`

use std::{fs, io, io::Read as _, path::Path};

use anyhow::{Context as _, Result};
use kvmi_client::pages;
use serde::Serialize;

use crate::{
    cli::{Data, Write},
    memory,
    output::{gpa, size, Output},
    problem::Problem,
    progress,
};

/// What is printed as JSON.
#[derive(Serialize)]
struct Written {
    gpa: String,
    length: usize,
}

/// Changes guest memory.
pub fn run(arguments: &Write, output: &mut Output) -> Result<()> {
    let data = bytes(&arguments.data)?;
    let (via, mut session) = memory::open(&arguments.source)?;
    let bar = progress::bar(data.len() as u64, output.is_json());
    let mut left = data.as_slice();
    for piece in pages(arguments.gpa, data.len() as u64)? {
        let (now, later) = left.split_at_checked(piece.len).unwrap_or_default();
        memory::write(&mut session.vm, &via, piece.gpa, now)
            .with_context(|| format!("cannot write guest memory at {}", gpa(piece.gpa)))?;
        bar.inc(piece.len as u64);
        left = later;
    }
    bar.finish_and_clear();
    session.close()?;

    if output.is_json() {
        return Ok(output.json(&Written {
            gpa: gpa(arguments.gpa),
            length: data.len(),
        })?);
    }
    let len = size(data.len() as u64);
    Ok(output.line(format_args!("wrote {len} at {}", gpa(arguments.gpa)))?)
}

/// The bytes to write.
fn bytes(data: &Data) -> Result<Vec<u8>> {
    if let Some(bytes) = data.hex.as_ref().or(data.text.as_ref()) {
        return Ok(bytes.0.clone());
    }
    let file = data.file.as_deref().unwrap_or(Path::new("-"));
    let bytes = if file == Path::new("-") {
        let mut bytes = Vec::new();
        io::stdin().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        fs::read(file)
    };
    let bytes = bytes.with_context(|| format!("cannot read {}", file.display()))?;
    if bytes.is_empty() {
        let what = format!("{} is empty", file.display());
        return Err(Problem::new(what, "give at least one byte to write").into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Bytes;

    #[test]
    fn bytes_come_from_the_argument_or_from_a_file() {
        let mut data = Data {
            hex: Some(Bytes(vec![1, 2])),
            text: None,
            file: None,
        };
        assert_eq!(bytes(&data).unwrap(), [1, 2]);
        let file = tempfile::NamedTempFile::new().unwrap();
        data.hex = None;
        data.file = Some(file.path().to_path_buf());
        assert!(bytes(&data).unwrap_err().to_string().contains("empty"));
        fs::write(file.path(), "abc").unwrap();
        assert_eq!(bytes(&data).unwrap(), b"abc");
    }
}
