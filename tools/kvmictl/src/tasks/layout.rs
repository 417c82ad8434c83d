// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Where a task has its fields.
//!
//! That depends on the kernel's configuration, and a System.map does not tell. But Linux has known
//! what to expect in its first tasks for decades: `init_task` is "swapper" with the pid 0, the next
//! one in the list of processes has the pid 1, and the one after that is "kthreadd" with the pid 2;
//! pid and tgid are neighbours. So
//!
//! * `comm` is where `init_task` says "swapper",
//! * `tasks` is the list by which one gets to a task with "kthreadd" there in two steps (lists of
//!   children, threads and so on lead to other places),
//! * `pid` is the first pair of 32-bit numbers that is 0, 0 in the first task, 1, 1 in the second one,
//!   and 2, 2 in the third one.
//!
//! A guest that has tampered with these three tasks is not understood.

use anyhow::Result;

use super::kernel_memory::Memory;
use crate::problem::Problem;

/// Bytes of a task's name.
pub const NAME_SIZE: usize = 16;
/// Where the kernel's half of the address space begins.
const KERNEL: u64 = 1 << 63;

/// Bytes that are read at once of what may end anywhere.
const STEP: usize = 64;

const FIRST: &[u8] = b"swapper";
const THIRD: &[u8] = b"kthreadd\0";

/// Offsets in a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `comm`
    pub name: u64,
    /// `tasks`
    pub list: u64,
    /// `pid`
    pub pid: u64,
}

impl Layout {
    /// Finds the offsets, given the address and the size of `init_task`.
    pub fn find(memory: &mut impl Memory, init: u64, size: u64) -> Result<Self> {
        let mut task = vec![0; usize::try_from(size)?];
        memory.read(init, &mut task)?;
        let name = memchr::memmem::find(&task, FIRST).ok_or_else(|| not_found("name"))?;
        for list in (0..task.len()).step_by(8) {
            let Some(tasks) = first_three(memory, init, &task, list as u64, name as u64) else {
                continue;
            };
            let pid = find_pid(memory, tasks, task.len());
            return Ok(Self {
                name: name as u64,
                list: list as u64,
                pid: pid.ok_or_else(|| not_found("pid"))?,
            });
        }
        Err(not_found("list"))
    }
}

fn not_found(what: &str) -> anyhow::Error {
    let what = format!("cannot find where the guest's tasks have their {what}");
    Problem::new(what, "the guest has to be a Linux that has booted").into()
}

/// The first three tasks, if their list is at the offset `list`. Where that is something else, what
/// looks like a pointer may lead anywhere.
fn first_three(
    memory: &mut impl Memory,
    init: u64,
    task: &[u8],
    list: u64,
    name: u64,
) -> Option<[u64; 3]> {
    let head = init.checked_add(list)?;
    let at = usize::try_from(list).ok()?;
    let second = u64::from_le_bytes(task.get(at..at + 8)?.try_into().ok()?);
    if second < KERNEL || second % 8 != 0 || second == head {
        return None;
    }
    // Its link back.
    if memory.number(second.checked_add(8)?).ok()? != head {
        return None;
    }
    let third = memory.number(second).ok()?;
    let [second, third] = [second, third].map(|link| link.checked_sub(list));
    let (second, third) = (second?, third?);
    let mut text = [0; NAME_SIZE];
    memory.read(third.checked_add(name)?, &mut text).ok()?;
    text.starts_with(THIRD).then_some([init, second, third])
}

/// The offset of `pid` in three tasks.
fn find_pid(memory: &mut impl Memory, tasks: [u64; 3], size: usize) -> Option<u64> {
    let contents = tasks.map(|gva| read_up_to(memory, gva, size));
    let is_pid = |at: &usize| {
        (0u32..).zip(&contents).all(|(pid, task)| {
            let pair = [pid.to_le_bytes(), pid.to_le_bytes()].concat();
            task.get(*at..*at + 8) == Some(&pair)
        })
    };
    (0..size).step_by(4).find(is_pid).map(|at| at as u64)
}

/// Reads `size` bytes at `gva`, or less if there is not as much: the size of `init_task` is only
/// known to be less than the distance to the next symbol.
fn read_up_to(memory: &mut impl Memory, gva: u64, size: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < size {
        let mut part = vec![0; STEP.min(size - bytes.len())];
        let next = gva.checked_add(bytes.len() as u64);
        match next.map(|next| memory.read(next, &mut part)) {
            Some(Ok(())) => bytes.append(&mut part),
            _ => break,
        }
    }
    bytes
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Where the tests have their fields.
    pub const LAYOUT: Layout = Layout {
        name: 0x80,
        list: 0x40,
        pid: 0x64,
    };
    /// Size of a task.
    pub const SIZE: u64 = 0x100;
    /// The first task.
    pub const INIT: u64 = 0xffff_ffff_8200_0000;

    /// Tasks at their addresses.
    pub struct Tasks(pub BTreeMap<u64, Vec<u8>>);

    impl Tasks {
        /// A list of tasks with these pids and names.
        pub fn new(tasks: &[(u32, &str)]) -> Self {
            let address = |at: usize| match at % tasks.len() {
                0 => INIT,
                at => 0xffff_8880_0000_0000 + at as u64 * 0x2000,
            };
            let mut memory = Self(BTreeMap::new());
            for (at, (pid, name)) in tasks.iter().enumerate() {
                let gva = address(at);
                memory.0.insert(gva, vec![0; SIZE as usize]);
                let next = address(at + 1) + LAYOUT.list;
                let before = address(at + tasks.len() - 1) + LAYOUT.list;
                memory.put(gva + LAYOUT.list, &next.to_le_bytes());
                memory.put(gva + LAYOUT.list + 8, &before.to_le_bytes());
                memory.put(gva + LAYOUT.pid, &pid.to_le_bytes());
                memory.put(gva + LAYOUT.pid + 4, &pid.to_le_bytes());
                memory.put(gva + LAYOUT.name, name.as_bytes());
            }
            memory
        }

        /// Changes what is somewhere.
        pub fn put(&mut self, gva: u64, bytes: &[u8]) {
            let (start, task) = self.0.range_mut(..=gva).next_back().unwrap();
            let at = (gva - start) as usize;
            task[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    impl Memory for Tasks {
        fn read(&mut self, gva: u64, buffer: &mut [u8]) -> Result<()> {
            let found = self.0.range(..=gva).next_back();
            let bytes = found.and_then(|(start, task)| {
                let at = (gva - start) as usize;
                task.get(at..at + buffer.len())
            });
            let bytes = bytes.ok_or(kvmi_client::Error::Unmapped(gva))?;
            buffer.copy_from_slice(bytes);
            Ok(())
        }
    }

    const FOUR: [(u32, &str); 4] = [
        (0, "swapper/0"),
        (1, "init"),
        (2, "kthreadd"),
        (3, "pool_workqueue_"),
    ];

    #[test]
    fn fields_are_found_by_what_is_in_the_first_tasks() {
        let mut tasks = Tasks::new(&FOUR);
        assert_eq!(Layout::find(&mut tasks, INIT, SIZE).unwrap(), LAYOUT);
    }

    #[test]
    fn other_lists_are_not_mistaken_for_that_of_tasks() {
        let mut tasks = Tasks::new(&FOUR);
        // As a list of children is: its members are linked by another field.
        let second = 0xffff_8880_0000_2000;
        tasks.put(INIT + 0x10, &(second + 0x20_u64).to_le_bytes());
        tasks.put(second + 0x20, &(second + 0x2020_u64).to_le_bytes());
        tasks.put(second + 0x28, &(INIT + 0x10).to_le_bytes());
        // An empty one, and nonsense.
        tasks.put(INIT + 0x20, &(INIT + 0x20).to_le_bytes());
        tasks.put(INIT + 0x30, &u64::MAX.to_le_bytes());
        assert_eq!(Layout::find(&mut tasks, INIT, SIZE).unwrap(), LAYOUT);
    }

    #[test]
    fn what_is_not_linux_is_a_problem() {
        for tasks in [
            &[(0, "idle"), (1, "init"), (2, "kthreadd")],
            &[(0, "swapper"), (1, "init"), (2, "kthreads")],
            &[(0, "swapper"), (2, "init"), (1, "kthreadd")],
        ] {
            let error = Layout::find(&mut Tasks::new(tasks), INIT, SIZE).unwrap_err();
            assert!(error.downcast_ref::<Problem>().is_some(), "{error}");
        }
    }
}
