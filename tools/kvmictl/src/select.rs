// SPDX-License-Identifier: GPL-2.0 OR MIT

//! From a selector to one VM.

use anyhow::Result;
use kvmi_client::{
    attach::Target,
    discover::{self, Scan, Vmm},
};

use crate::{cli::Selector, problem::Problem};

/// Finds the process that a selector means.
pub fn vmm(selector: &Selector) -> Result<Vmm> {
    match selector.pid {
        Some(pid) => Ok(discover::process(pid)?),
        None => choose(discover::scan()?, selector),
    }
}

/// Finds the VM that a selector means.
pub fn target(selector: &Selector) -> Result<(Vmm, Target)> {
    let vmm = vmm(selector)?;
    let target = Target::new(&vmm, selector.vm_fd)?;
    Ok((vmm, target))
}

fn matches(vmm: &Vmm, selector: &Selector) -> bool {
    let known = &vmm.command_line;
    match (&selector.uuid, &selector.name) {
        (Some(uuid), _) => known.uuid.as_ref() == Some(uuid),
        (None, Some(name)) => known.guest_name.as_ref() == Some(name),
        (None, None) => true,
    }
}

fn choose(scan: Scan, selector: &Selector) -> Result<Vmm> {
    let any = selector.uuid.is_none() && selector.name.is_none();
    let mut found: Vec<Vmm> = scan.vmms;
    found.retain(|vmm| matches(vmm, selector));
    match (found.pop(), found.as_slice()) {
        (Some(vmm), []) => Ok(vmm),
        (Some(last), _) => {
            found.push(last);
            let pids: Vec<_> = found.iter().map(|vmm| vmm.pid.to_string()).collect();
            let pids = pids.join(", ");
            let what = format!("several VMs fit: those of the processes {pids}");
            Err(Problem::new(what, "choose one with --pid, --uuid or --name").into())
        }
        (None, _) => {
            let what = if any {
                "no VM runs on this host"
            } else {
                "no VM fits"
            };
            let hint = if scan.hidden > 0 {
                "only your own processes can be seen: run this as root to see all"
            } else if any {
                "start one first"
            } else {
                "kvmictl list shows the VMs"
            };
            Err(Problem::new(what, hint).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmi_client::{qemu::CommandLine, Uuid};

    fn vmm(pid: i32, name: &str) -> Vmm {
        Vmm {
            pid,
            name: "qemu".to_owned(),
            command_line: CommandLine {
                guest_name: Some(name.to_owned()),
                uuid: Some(Uuid::from_u128(pid.unsigned_abs().into())),
                memory: None,
            },
            start_time: 0,
            start_ticks: 0,
            vm_fds: vec![9],
            vcpus: 1,
        }
    }

    fn chosen(vmms: &[Vmm], selector: &Selector) -> Result<i32> {
        let scan = Scan {
            vmms: vmms.to_vec(),
            hidden: 0,
        };
        Ok(choose(scan, selector)?.pid)
    }

    #[test]
    fn only_vm_needs_no_selector() {
        let any = Selector::default();
        assert_eq!(chosen(&[vmm(5, "a")], &any).unwrap(), 5);
        let error = chosen(&[vmm(5, "a"), vmm(6, "b")], &any).unwrap_err();
        assert!(error.to_string().contains("5, 6"), "{error}");
        assert!(chosen(&[], &any).is_err());
    }

    #[test]
    fn name_and_uuid_select() {
        let vmms = [vmm(5, "a"), vmm(6, "b"), vmm(7, "b")];
        let named = |name: &str| Selector {
            name: Some(name.to_owned()),
            ..Default::default()
        };
        assert_eq!(chosen(&vmms, &named("a")).unwrap(), 5);
        assert!(chosen(&vmms, &named("b")).is_err());
        assert!(chosen(&vmms, &named("c")).is_err());
        let six = Selector {
            uuid: Some(Uuid::from_u128(6)),
            ..Default::default()
        };
        assert_eq!(chosen(&vmms, &six).unwrap(), 6);
    }
}
