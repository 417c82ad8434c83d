// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl tasks`

mod kernel_memory;
mod layout;
mod walk;

use anyhow::Result;
use serde::Serialize;

use crate::{
    address::no_symbols,
    cli::Tasks,
    memory,
    output::{hex, plain, Output},
    problem::Problem,
    symbols::Names,
    table::Table,
};

use kernel_memory::KernelMemory;
use layout::Layout;
use walk::{walk, Task};

/// How often to begin anew because the list changes under our eyes.
const ATTEMPTS: usize = 10;

/// Bytes that a task may have: more than any configuration's.
const MAX_TASK: u64 = 32 << 10;

/// A task as JSON.
#[derive(Serialize)]
struct Printed {
    pid: u32,
    name: String,
    /// Where its `task_struct` is.
    gva: String,
}

/// Lists the tasks of a guest.
pub fn run(arguments: &Tasks, output: &mut Output) -> Result<()> {
    let symbols = Names::load(&arguments.symbols)?
        .ok_or_else(|| no_symbols("the list of tasks begins at a symbol"))?;
    let (via, mut session) = memory::open(&arguments.source)?;
    let vcpus = session.vcpus();
    let names = Names::locate(Some(symbols), &mut session.vm, &vcpus)?;
    let first = names.address("init_task")?;
    let size = names.size("init_task")?.min(MAX_TASK);
    let mut memory = KernelMemory::new(&mut session.vm, &via, vcpus);
    let layout = Layout::find(&mut memory, first, size)?;
    let tasks = list(&mut memory, first, &layout)?;
    drop(memory);
    session.close()?;
    print(&tasks, output)
}

fn list(memory: &mut KernelMemory<'_>, first: u64, layout: &Layout) -> Result<Vec<Task>> {
    for _ in 0..ATTEMPTS {
        if let Some(tasks) = walk(memory, first, layout)? {
            return Ok(tasks);
        }
    }
    let what = "the list of tasks changes too fast";
    Err(Problem::new(
        what,
        "try again while the guest starts and ends fewer of them",
    )
    .into())
}

fn print(tasks: &[Task], output: &mut Output) -> Result<()> {
    if output.is_json() {
        let tasks = tasks.iter().map(|task| Printed {
            pid: task.pid,
            name: task.name.clone(),
            gva: hex(task.gva),
        });
        return Ok(output.json(&tasks.collect::<Vec<_>>())?);
    }
    let mut table = Table::new(&["PID", "TASK", "NAME"]);
    for task in tasks {
        table.add([task.pid.to_string(), hex(task.gva), plain(&task.name)]);
    }
    Ok(output.line(table.align_right(&[0]))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Source, SymbolFile};

    #[test]
    fn symbols_are_missed_before_a_vm_is_looked_for() {
        let arguments = Tasks {
            source: Source::default(),
            symbols: SymbolFile { file: None },
        };
        let error = run(&arguments, &mut Output::new(false)).unwrap_err();
        let what = "the list of tasks begins at a symbol, and no file has symbols";
        assert_eq!(error.to_string(), what);
    }
}
