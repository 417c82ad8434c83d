// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Single-stepping a vCPU.

use std::{os::fd::AsFd, time::Duration};

use anyhow::Result;
use kvmi_client::{Action, Connection, Error, Event, VcpuEvent, VcpuEventKind};

use crate::problem::Problem;

/// Fails unless the vCPUs of a VM can be single-stepped.
pub fn check<S: AsFd>(vm: &mut Connection<S>) -> Result<()> {
    if vm.get_version()?.features.singlestep != 0 {
        return Ok(());
    }
    let what = "the VM cannot be single-stepped";
    let hint = "it takes a kvmi_host that can do it, and a CPU that can, where the VM runs";
    Err(Problem::new(what, hint).into())
}

/// Waits for the next event of a vCPU that is not a pause; nothing if there is none in time. Pauses
/// are ended, and events of others are left for later.
pub fn next_event<S: AsFd>(
    vm: &mut Connection<S>,
    vcpu: u16,
    timeout: Duration,
) -> Result<Option<VcpuEvent>, Error> {
    let is_of_vcpu = |event: &Event| matches!(event, Event::Vcpu(event) if event.vcpu == vcpu);
    loop {
        match vm.wait_for_event(Some(timeout), is_of_vcpu) {
            Ok(Event::Vcpu(event)) if event.kind == VcpuEventKind::Pause => {
                vm.reply_event(&event, Action::Continue)?;
            }
            Ok(Event::Vcpu(event)) => return Ok(Some(*event)),
            Ok(_) => {}
            Err(Error::Timeout) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::{vcpu_event, with_script};
    use kvmi_client::abi::wire::ReplyHead;

    #[test]
    fn host_says_whether_it_can_single_step() {
        for (feature, can) in [(0, false), (1, true)] {
            let host = |header: &_, _: &[u8]| {
                let head = ReplyHead::success(header, 16).unwrap();
                let mut version = [0; 16];
                version[8] = feature;
                [head.as_bytes(), &version].concat()
            };
            assert_eq!(with_script(host, check).is_ok(), can);
        }
    }

    #[test]
    fn pauses_are_ended_and_events_of_others_are_kept() {
        let mut replies = Vec::new();
        let host = |header: &kvmi_client::abi::wire::Header, payload: &[u8]| {
            if header.id == 1 {
                replies.push((header.seq, payload[8]));
                return Vec::new();
            }
            let events = [
                vcpu_event(1, 0, 1, &[]),
                vcpu_event(2, 1, 1, &[]),
                vcpu_event(3, 1, 19, &[0; 8]),
            ];
            let head = ReplyHead::success(header, 16).unwrap();
            [events.concat(), head.as_bytes().to_vec(), vec![0; 16]].concat()
        };
        with_script(host, |vm| {
            vm.get_info().unwrap();
            let short = Duration::from_millis(20);
            let event = next_event(vm, 1, short).unwrap().unwrap();
            assert_eq!(event.kind, VcpuEventKind::Singlestep { failed: false });
            assert!(next_event(vm, 1, short).unwrap().is_none());
            assert!(matches!(vm.try_event(), Ok(Some(Event::Vcpu(event))) if event.vcpu == 0));
        });
        assert_eq!(replies, [(2, 0)]);
    }
}
