// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl translate`

use anyhow::Result;
use kvmi_client::Error;
use serde_json::json;

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
    let found = session.vm.translate_gva(vcpu, gva)?;
    session.close()?;

    let found = found.ok_or(Error::Unmapped(gva))?;
    if output.is_json() {
        let translation = json!({ "vcpu": vcpu, "gva": hex(gva), "gpa": gpa(found) });
        return Ok(output.json(&translation)?);
    }
    Ok(output.line(gpa(found))?)
}
