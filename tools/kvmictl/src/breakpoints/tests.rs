// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Breakpoints in a VM that does what a test tells it.

use super::*;
use crate::{
    memory::tests::{vcpu_event, with_script},
    wait::Waiter,
};
use kvmi_client::{
    abi::wire::{Header, ReplyHead},
    Command,
};
use patch::INT3;
use std::{collections::VecDeque, os::fd::AsFd as _};

const GPA: u64 = 0x5000;
const GVA: u64 = 0xffff_ffff_8100_5000;
const PUSH: u8 = 0x55;

/// What a vCPU sends when it is let into the guest: which event, and what is specific to it.
type Sent = (u8, Vec<u8>);

/// A VM of two vCPUs with one byte of memory.
struct Host {
    byte: u8,
    seq: u32,
    /// What vCPU 1 sends, one after the other, when it gets replies.
    script: VecDeque<Sent>,
    /// Pauses that vCPUs have not sent so far.
    pauses: [u32; 2],
    /// Which vCPUs wait for a reply.
    waiting: [bool; 2],
    log: Vec<String>,
}

fn breakpoint(gpa: u64) -> Sent {
    let mut data = gpa.to_ne_bytes().to_vec();
    data.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    (5, data)
}

fn step(failed: u8) -> Sent {
    (19, vec![failed, 0, 0, 0, 0, 0, 0, 0])
}

impl Host {
    fn new(script: impl IntoIterator<Item = Sent>) -> Self {
        Self {
            byte: PUSH,
            seq: 0,
            script: script.into_iter().collect(),
            pauses: [0; 2],
            waiting: [false; 2],
            log: Vec::new(),
        }
    }

    /// What a vCPU sends that is let go: what the script says, or a pause.
    fn go_on(&mut self, vcpu: u16) -> Vec<u8> {
        let at = usize::from(vcpu);
        if self.waiting[at] {
            return Vec::new();
        }
        let next = if vcpu == 1 {
            self.script.pop_front()
        } else {
            None
        };
        let (id, data) = match next {
            Some(sent) => sent,
            None if self.pauses[at] > 0 => {
                self.pauses[at] -= 1;
                (1, Vec::new())
            }
            None => return Vec::new(),
        };
        self.waiting[at] = true;
        self.seq += 1;
        vcpu_event(self.seq, vcpu, id, &data)
    }

    fn serve(&mut self, header: &Header, payload: &[u8]) -> Vec<u8> {
        let reply = |data: &[u8]| {
            let head = ReplyHead::success(header, data.len()).unwrap();
            [head.as_bytes(), data].concat()
        };
        let vcpu = u16::from(payload.first().copied().unwrap_or_default());
        match Command::from_id(header.id) {
            None => {
                let [action, event] = payload[8..10] else {
                    panic!("not a reply");
                };
                self.log.push(format!(
                    "vCPU {vcpu} event {event} action {action}, byte {:#x}",
                    self.byte
                ));
                self.waiting[usize::from(vcpu)] = false;
                self.go_on(vcpu)
            }
            Some(Command::VmGetInfo) => reply(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            Some(Command::VcpuControlEvents) => reply(&[]),
            Some(Command::VmPauseVcpu) => {
                self.log.push(format!("hold vCPU {vcpu}"));
                self.pauses[usize::from(vcpu)] += 1;
                [reply(&[]), self.go_on(vcpu)].concat()
            }
            Some(Command::VcpuControlSinglestep) => {
                self.log.push(format!("step vCPU {vcpu}: {}", payload[8]));
                reply(&[])
            }
            Some(Command::VmReadPhysical) => reply(&[self.byte]),
            Some(Command::VmWritePhysical) => {
                self.byte = payload[16];
                reply(&[])
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Lets breakpoints at one place do what `test` says.
fn with_breaks<R>(
    host: &mut Host,
    test: impl FnOnce(&mut Breaks<'_>, &mut Connection<OwnedFd>) -> R,
) -> R {
    with_script(
        |header, payload| host.serve(header, payload),
        |vm| {
            let mut roster = Roster::default();
            roster.prepare(vm, switch_on).unwrap();
            let mut output = Output::discard(true);
            let subject = crate::session::Subject {
                pid: None,
                name: None,
            };
            let mut breaks = Breaks {
                patches: Patches::insert(vm, &[(GVA, GPA)]).0,
                names: Names::none(),
                roster,
                begun: Instant::now(),
                report: Report::new(subject, &mut output),
                hits: 0,
                others: 0,
                interrupted: VecDeque::new(),
                pending: None,
                stepping: None,
            };
            let outcome = test(&mut breaks, vm);
            // The host has all replies by now.
            vm.get_info().unwrap();
            outcome
        },
    )
}

/// Serves events until so many hits were told, and no more are waiting.
fn serve(breaks: &mut Breaks<'_>, vm: &mut Connection<OwnedFd>, hits: u64) {
    let waiter = Waiter::new(None, vm.stream().as_fd()).unwrap();
    let until = cli::Until {
        count: Some(hits),
        duration: Some(PATIENCE),
    };
    let begun = breaks.begun;
    let stop = serve::serve(breaks, vm, &waiter, until, begun).unwrap();
    assert_eq!(stop, Stop::Count);
}

/// Has vCPU 1 begin to do what the script says.
fn begin(vm: &mut Connection<OwnedFd>) {
    vm.pause_vcpu(1, true).unwrap();
}

#[test]
fn instruction_is_executed_while_the_other_vcpu_is_held() {
    let mut host = Host::new([breakpoint(GPA), step(0)]);
    with_breaks(&mut host, |breaks, vm| {
        begin(vm);
        serve(breaks, vm, 1);
        assert_eq!((breaks.hits, breaks.others), (1, 0));
        assert!(breaks.interrupted.is_empty() && breaks.pending.is_none());
    });
    let expected = [
        "hold vCPU 1",
        "hold vCPU 0",
        "step vCPU 1: 1",
        "vCPU 1 event 5 action 1, byte 0x55",
        "step vCPU 1: 0",
        "vCPU 1 event 19 action 0, byte 0xcc",
    ];
    assert_eq!(host.log, expected);
    assert_eq!(host.byte, INT3);
}

#[test]
fn breakpoint_of_the_guests_own_is_its_business() {
    let mut host = Host::new([
        breakpoint(0x7000),
        breakpoint(u64::MAX),
        breakpoint(GPA),
        step(0),
    ]);
    with_breaks(&mut host, |breaks, vm| {
        begin(vm);
        serve(breaks, vm, 1);
        assert_eq!((breaks.hits, breaks.others), (1, 2));
    });
    let replies: Vec<_> = host
        .log
        .iter()
        .filter(|line| line.contains("event 5"))
        .collect();
    assert_eq!(replies[0], "vCPU 1 event 5 action 0, byte 0xcc");
    assert_eq!(replies[1], "vCPU 1 event 5 action 0, byte 0xcc");
    assert_eq!(replies[2], "vCPU 1 event 5 action 1, byte 0x55");
}

#[test]
fn interrupted_instruction_is_told_once() {
    // Something comes first, and the vCPU stays: it tries again. Then it is somewhere else, and comes
    // back. After that, it hits the breakpoint anew.
    let elsewhere = breakpoint(0x7000);
    let mut host = Host::new([
        breakpoint(GPA),
        step(1),
        elsewhere,
        breakpoint(GPA),
        step(0),
        breakpoint(GPA),
        step(0),
    ]);
    with_breaks(&mut host, |breaks, vm| {
        begin(vm);
        serve(breaks, vm, 2);
        assert_eq!((breaks.hits, breaks.others), (2, 1));
        assert!(breaks.interrupted.is_empty());
    });
    let bytes: Vec<_> = host
        .log
        .iter()
        .filter_map(|line| line.strip_prefix("vCPU 1 event "))
        .collect();
    let expected = [
        "5 action 1, byte 0x55",
        "19 action 0, byte 0x55",
        // Whatever happens elsewhere, the breakpoint is there.
        "5 action 0, byte 0xcc",
        "5 action 1, byte 0x55",
        "19 action 0, byte 0xcc",
        "5 action 1, byte 0x55",
        "19 action 0, byte 0xcc",
    ];
    assert_eq!(bytes, expected);
}

#[test]
fn whoever_waits_at_a_breakpoint_tries_again_when_it_is_gone() {
    let mut host = Host::new([breakpoint(GPA), breakpoint(0x7000)]);
    with_breaks(&mut host, |breaks, vm| {
        begin(vm);
        breaks.remove(vm).unwrap();
        // The pauses that are left end with the connection.
        assert!(matches!(vm.try_event(), Ok(None)));
    });
    let replies: Vec<_> = host
        .log
        .iter()
        .filter(|line| line.contains("event"))
        .collect();
    let expected = [
        "vCPU 0 event 1 action 0, byte 0x55",
        "vCPU 1 event 5 action 1, byte 0x55",
        "vCPU 1 event 5 action 0, byte 0x55",
        "vCPU 1 event 1 action 0, byte 0x55",
    ];
    let (zero, one): (Vec<_>, Vec<_>) = replies.into_iter().partition(|l| l.starts_with("vCPU 0"));
    assert_eq!([zero, one].concat(), expected);
    assert_eq!(host.byte, PUSH);
}

#[test]
fn breakpoints_go_even_if_an_instruction_does_not_end() {
    // The vCPU is in the middle of a step.
    let mut host = Host::new([]);
    with_breaks(&mut host, |breaks, vm| {
        breaks.patches.all()[0].take_out(vm).unwrap();
        breaks.stepping = Some(1);
        breaks.remove(vm).unwrap();
        assert_eq!(breaks.stepping, None);
    });
    assert!(host.log.contains(&"step vCPU 1: 0".to_owned()));
    assert_eq!(host.byte, PUSH);
}
