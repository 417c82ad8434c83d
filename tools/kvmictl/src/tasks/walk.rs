// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Along the list of tasks, while the guest changes it.

use anyhow::Result;

use super::{
    kernel_memory::Memory,
    layout::{Layout, NAME_SIZE},
};
use crate::problem::Problem;

/// More tasks than pids that Linux can give.
const MAX_TASKS: usize = 1 << 22;

/// A task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Where its `task_struct` is.
    pub gva: u64,
    /// Its process id.
    pub pid: u32,
    /// Its name, as far as that is text.
    pub name: String,
}

/// Lists the tasks from `init_task` on; nothing if the list was changed meanwhile.
pub fn walk(memory: &mut impl Memory, init: u64, layout: &Layout) -> Result<Option<Vec<Task>>> {
    let head = init.wrapping_add(layout.list);
    let mut tasks = Vec::new();
    let mut link = head;
    while tasks.len() < MAX_TASKS {
        tasks.push(look(memory, link.wrapping_sub(layout.list), layout)?);
        let next = memory.number(link)?;
        // One that ends is taken out of the list: its neighbours no longer know it.
        let back = memory.number(next.wrapping_add(8));
        if !back.is_ok_and(|back| back == link) {
            return Ok(None);
        }
        if next == head {
            return Ok(Some(tasks));
        }
        link = next;
    }
    let what = "the list of tasks has no end";
    Err(Problem::new(what, "the guest may have been tampered with").into())
}

fn look(memory: &mut impl Memory, gva: u64, layout: &Layout) -> Result<Task> {
    let mut name = [0; NAME_SIZE];
    memory.read(gva.wrapping_add(layout.name), &mut name)?;
    let text = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut pid = [0; 4];
    memory.read(gva.wrapping_add(layout.pid), &mut pid)?;
    Ok(Task {
        gva,
        pid: u32::from_le_bytes(pid),
        name: String::from_utf8_lossy(text).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::layout::tests::{Tasks, INIT, LAYOUT};

    fn three() -> Tasks {
        Tasks::new(&[(0, "swapper/0"), (1, "init"), (77, "0123456789abcdef")])
    }

    #[test]
    fn all_tasks_are_listed_in_order() {
        let tasks = walk(&mut three(), INIT, &LAYOUT).unwrap().unwrap();
        let seen: Vec<_> = tasks.iter().map(|t| (t.pid, t.name.as_str())).collect();
        let expected = [(0, "swapper/0"), (1, "init"), (77, "0123456789abcdef")];
        assert_eq!(seen, expected);
        assert_eq!(tasks[0].gva, INIT);
    }

    #[test]
    fn list_that_changes_is_noticed() {
        let mut tasks = three();
        tasks.put(INIT + LAYOUT.list + 8, &1_u64.to_le_bytes());
        assert_eq!(walk(&mut tasks, INIT, &LAYOUT).unwrap(), None);
        let mut tasks = three();
        tasks.put(INIT + LAYOUT.list, &0x10_u64.to_le_bytes());
        assert_eq!(walk(&mut tasks, INIT, &LAYOUT).unwrap(), None);
    }
}
