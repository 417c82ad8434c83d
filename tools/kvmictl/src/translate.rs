// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl translate`

use anyhow::Result;
use kvmi_client::{Error, TableEntry};
use serde_json::{json, Value};

use crate::{
    cli::Translate,
    output::{gpa, hex, Output},
    session::Session,
};

/// Translates a guest virtual address.
pub fn run(arguments: &Translate, output: &mut Output) -> Result<()> {
    let vcpu = arguments.vcpu;
    let mut session = Session::open(&arguments.vm)?;
    session.check_vcpu(vcpu)?;
    let gva = arguments.gva.resolve(&arguments.symbols, &mut session)?;
    let (found, tables) = if arguments.tables {
        // What is said of the tables has to be true at one time.
        let mut paused = session.pause()?;
        let tables = paused.page_tables(vcpu, gva)?;
        let found = paused.translate_gva(vcpu, gva)?;
        paused.resume()?;
        (found, tables)
    } else {
        (session.vm.translate_gva(vcpu, gva)?, Vec::new())
    };
    session.close()?;

    if !output.is_json() {
        for entry in &tables {
            output.line(line(entry))?;
        }
    }
    if output.is_json() && (found.is_some() || arguments.tables) {
        let mut translation = json!({ "vcpu": vcpu, "gva": hex(gva), "gpa": found.map(gpa) });
        if arguments.tables {
            translation["tables"] = tables.iter().map(object).collect();
        }
        output.json(&translation)?;
    }
    let found = found.ok_or(Error::Unmapped(gva))?;
    if !output.is_json() {
        output.line(gpa(found))?;
    }
    Ok(())
}

fn line(entry: &TableEntry) -> String {
    let TableEntry {
        level,
        gpa: at,
        value,
    } = entry;
    format!("level {level}: {value:#018x} at {}", gpa(*at))
}

fn object(entry: &TableEntry) -> Value {
    json!({ "level": entry.level, "gpa": gpa(entry.gpa), "value": hex(entry.value) })
}
