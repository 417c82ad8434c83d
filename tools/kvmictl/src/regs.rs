// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl regs`

pub mod sets;

use std::{collections::BTreeMap, os::fd::AsFd};

use anyhow::{Context as _, Result};
use kvmi_client::{abi::arch::DescriptorTable, Paused, Registers};
use serde::Serialize;
use serde_json::{json, Value};

use sets::{columns, control, general, segment_json, segment_line, segments, tables};

use crate::{
    cli,
    msr::Msr,
    output::{hex, Output},
    session::Session,
    state,
    symbols::Names,
};

/// The registers of a vCPU.
struct Vcpu {
    index: u16,
    registers: Registers,
}

/// What is printed as JSON.
#[derive(Serialize)]
struct All {
    vcpus: Vec<Value>,
    /// vCPUs that the guest has not started.
    dormant: Vec<u16>,
}

/// Prints the registers of vCPUs.
pub fn run(arguments: &cli::Regs, output: &mut Output) -> Result<()> {
    let symbols = Names::load(&arguments.symbols)?;
    let mut session = Session::open(&arguments.vm)?;
    if let Some(vcpu) = arguments.vcpu {
        session.check_vcpu(vcpu)?;
    }
    let msrs: Vec<u32> = arguments.msrs.iter().map(|msr| msr.0).collect();
    let mut paused = session.pause()?;
    let vcpus = read(&mut paused, arguments.vcpu, &msrs)?;
    let names = Names::locate_paused(symbols, &mut paused)?;
    let dormant = match arguments.vcpu {
        Some(_) => Vec::new(),
        None => paused.dormant().to_vec(),
    };
    paused.resume()?;
    session.close()?;

    if output.is_json() {
        let vcpus = vcpus.iter().map(|vcpu| vcpu.json(&names)).collect();
        return Ok(output.json(&All { vcpus, dormant })?);
    }
    for (at, vcpu) in vcpus.iter().enumerate() {
        if at > 0 {
            output.line("")?;
        }
        for line in vcpu.lines(&names) {
            output.line(line)?;
        }
    }
    for vcpu in dormant {
        output.line(format_args!("\nvCPU {vcpu}: not started"))?;
    }
    Ok(())
}

/// Reads the registers of one vCPU or of all.
fn read<S: AsFd>(paused: &mut Paused<'_, S>, only: Option<u16>, msrs: &[u32]) -> Result<Vec<Vcpu>> {
    let vcpus: Vec<u16> = match only {
        Some(vcpu) => vec![vcpu],
        None => paused.vcpus().iter().map(|event| event.vcpu).collect(),
    };
    let mut all = Vec::with_capacity(vcpus.len());
    for index in vcpus {
        let registers = paused.get_registers(index, msrs);
        let registers =
            registers.with_context(|| format!("cannot read the registers of vCPU {index}"))?;
        all.push(Vcpu { index, registers });
    }
    Ok(all)
}

impl Vcpu {
    fn mode(&self) -> &'static str {
        state::mode(self.registers.mode)
    }

    fn cpl(&self) -> u8 {
        state::cpl(&self.registers.regs, &self.registers.sregs)
    }

    fn json(&self, names: &Names) -> Value {
        let Registers {
            regs, sregs, msrs, ..
        } = &self.registers;
        let numbers = |numbers: &[(&'static str, u64)]| -> BTreeMap<_, _> {
            numbers.iter().map(|(name, n)| (*name, hex(*n))).collect()
        };
        let segments: BTreeMap<_, _> = segments(sregs).into_iter().map(segment_json).collect();
        let tables: BTreeMap<_, _> = tables(sregs)
            .into_iter()
            .map(|(name, table)| {
                let value = json!({ "base": hex(table.base), "limit": hex(table.limit) });
                (name, value)
            })
            .collect();
        let msrs: BTreeMap<_, _> = msrs
            .iter()
            .map(|(index, value)| (Msr(*index).name(), hex(*value)))
            .collect();
        let mut json = json!({
            "vcpu": self.index,
            "mode": self.mode(),
            "cpl": self.cpl(),
            "regs": numbers(&general(regs)),
            "control": numbers(&control(sregs)),
            "segments": segments,
            "tables": tables,
            "msrs": msrs,
        });
        if names.are_known() {
            json["symbol"] = json!(names.json(regs.rip));
        }
        json
    }

    /// For people.
    fn lines(&self, names: &Names) -> Vec<String> {
        let Registers {
            regs, sregs, msrs, ..
        } = &self.registers;
        let (index, mode, cpl) = (self.index, self.mode(), self.cpl());
        let mut lines = vec![format!("vCPU {index}: {mode}, CPL {cpl}")];
        lines.extend(columns(&general(regs)));
        lines.extend(names.text(regs.rip).map(|place| format!("at      {place}")));
        lines.push(format!("flags   {}", state::flags(regs.rflags)));
        lines.extend(columns(&control(sregs)));
        lines.extend(segments(sregs).into_iter().map(segment_line));
        lines.extend(tables(sregs).map(|(name, table)| {
            let DescriptorTable { base, limit, .. } = table;
            format!("{name:<8}     base {base:016x}  limit {limit:08x}")
        }));
        lines.extend(
            msrs.iter()
                .map(|(index, value)| format!("{:<24}{value:016x}", Msr(*index).name())),
        );
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        memory::tests::{vcpu_event, with_script},
        symbols::tests::with_names,
    };
    use kvmi_client::{
        abi::{
            arch::{Regs, Segment, Sregs},
            wire::{Header, ReplyHead},
        },
        KvmiError,
    };
    use std::time::Duration;

    fn vcpu() -> Vcpu {
        let mut sregs = Sregs {
            cr0: 0x8000_0001,
            ..Default::default()
        };
        sregs.cs = Segment {
            selector: 0x10,
            limit: u32::MAX,
            type_: 11,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        sregs.ss.dpl = 3;
        sregs.gdt.limit = 0x7f;
        let regs = Regs {
            rax: 1,
            rip: 0xffff_ffff_8100_0000,
            rflags: 0x246,
            ..Default::default()
        };
        Vcpu {
            index: 1,
            registers: Registers {
                mode: 8,
                regs,
                sregs,
                msrs: vec![(0xc000_0082, 5), (0x1234, 6)],
            },
        }
    }

    #[test]
    fn lines_are_columns() {
        let lines = vcpu().lines(&Names::none());
        assert_eq!(lines[0], "vCPU 1: 64-bit, CPL 3");
        assert_eq!(
            lines[1],
            "rax     0000000000000001  rbx     0000000000000000  rcx     0000000000000000"
        );
        assert_eq!(lines[7], "flags   PF ZF IF");
        let cs = "cs      0010 base 0000000000000000  limit ffffffff  type b  dpl 0  P S L G";
        assert_eq!(lines[11], cs);
        assert_eq!(
            lines[19],
            "gdt          base 0000000000000000  limit 0000007f"
        );
        assert_eq!(lines[21], "LSTAR                   0000000000000005");
        assert_eq!(lines[22], "0x1234                  0000000000000006");
        assert!(lines.iter().all(|line| line.len() <= 80), "{lines:#?}");
    }

    /// A VM with two vCPUs, the second of which is not started; rip of the first is 0x77.
    fn host(header: &Header, _: &[u8]) -> Vec<u8> {
        let reply = |data: &[u8]| {
            let head = ReplyHead::success(header, data.len()).unwrap();
            [head.as_bytes(), data].concat()
        };
        match (header.id, header.seq) {
            (1, _) => Vec::new(),
            (8, _) => reply(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (3, 2) => reply(&[0; 8]),
            (3, _) => ReplyHead::failure(header, KvmiError::Again)
                .as_bytes()
                .to_vec(),
            (16, _) => [reply(&[]), vcpu_event(1, 0, 1, &[])].concat(),
            (7, _) => {
                let mut registers = [0; 472];
                registers[0] = 4;
                registers[136] = 0x77;
                reply(&registers)
            }
            (id, _) => panic!("command {id} was not expected"),
        }
    }

    #[test]
    fn registers_of_the_started_vcpus_are_read_while_they_are_paused() {
        with_script(host, |vm| {
            let mut paused = vm.pause_all(Duration::from_secs(5)).unwrap();
            let vcpus = read(&mut paused, None, &[]).unwrap();
            assert_eq!((vcpus.len(), vcpus[0].index), (1, 0));
            assert_eq!(vcpus[0].registers.regs.rip, 0x77);
            assert_eq!(vcpus[0].mode(), "32-bit");
            assert_eq!(paused.dormant(), [1]);
            paused.resume().unwrap();
        });
    }

    #[test]
    fn json_has_everything_by_name() {
        let json = vcpu().json(&Names::none());
        assert_eq!(json["regs"]["rip"], "0xffffffff81000000");
        assert_eq!(json["control"]["cr0"], "0x80000001");
        assert_eq!(json["segments"]["cs"]["long"], true);
        assert_eq!(json["tables"]["gdt"]["limit"], "0x7f");
        assert_eq!(json["msrs"]["LSTAR"], "0x5");
        assert_eq!(json["msrs"]["0x1234"], "0x6");
        assert_eq!((&json["mode"], &json["cpl"]), (&json!("64-bit"), &json!(3)));
        assert!(json.get("symbol").is_none());
    }

    #[test]
    fn place_of_the_code_has_its_name_if_that_is_known() {
        with_names(|names| {
            let mut vcpu = vcpu();
            assert_eq!(vcpu.lines(names).len(), 23);
            assert_eq!(vcpu.json(names)["symbol"], Value::Null);
            vcpu.registers.regs.rip = 0xffff_ffff_8120_0104;
            assert_eq!(vcpu.lines(names)[7], "at      schedule+0x4/0x100");
            let expected = json!({
                "symbol": "schedule",
                "offset": "0x4",
                "size": "0x100",
                "module": null,
            });
            assert_eq!(vcpu.json(names)["symbol"], expected);
        });
    }
}
