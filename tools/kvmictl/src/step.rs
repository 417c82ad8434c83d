// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl step`

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::Result;
use kvmi_client::{Action, Connection, Paused, VcpuEvent, VcpuEventKind};
use serde::Serialize;
use serde_json::json;

use crate::{
    cli,
    instruction::Instruction,
    output::{hex, Output},
    problem::Problem,
    serve::{self, Stop},
    session::Session,
    stepper,
    symbols::{Names, Printed},
    wait::{End, Waiter},
};

/// How often to look whether to stop while an instruction takes its time: HLT waits for an interrupt.
const LOOK: Duration = Duration::from_millis(100);

/// How many times in a row an instruction may be put off.
const MOST_FAILURES: u32 = 1000;

/// An instruction, as it is printed as JSON.
#[derive(Debug, Serialize)]
struct Line {
    rip: String,
    symbol: Option<Printed>,
    /// Its bytes in hexadecimal, if they could be read.
    bytes: Option<String>,
    text: Option<String>,
    /// What it jumps to, or accesses, if that has a name.
    target: Option<Printed>,
    /// Whether it was executed, rather than put off because of something else.
    executed: bool,
    /// For people, where it is and what it names.
    #[serde(skip)]
    places: (Option<String>, Option<String>),
}

/// Executes instructions of a vCPU one by one.
pub fn run(arguments: &cli::Step, output: &mut Output) -> Result<()> {
    let symbols = Names::load(&arguments.symbols)?;
    let mut session = Session::open(&arguments.vm)?;
    session.check_vcpu(arguments.vcpu)?;
    stepper::check(&mut session.vm)?;
    // From here on an interrupt ends the steps rather than the process.
    let waiter = session.watch()?;
    session.allow_pause(None)?;
    let pid = session.subject().pid;
    let begun = Instant::now();
    let mut paused = session.pause()?;
    let names = Names::locate_paused(symbols, &mut paused)?;
    let mut steps = Steps {
        pid,
        vcpu: arguments.vcpu,
        names,
        executed: 0,
        rip: 0,
    };
    let outcome = steps.take(&mut paused, arguments.count, &waiter, output);
    drop(paused);
    let stop = serve::judge(outcome, &waiter)?;
    serve::close(session, stop)?;
    steps.end(begun.elapsed(), stop, output)
}

/// Steps of a vCPU.
struct Steps {
    /// The process of the VM, if it is on this machine.
    pid: Option<i32>,
    vcpu: u16,
    names: Names,
    executed: u64,
    /// Where the vCPU is.
    rip: u64,
}

impl Steps {
    /// Executes instructions, and prints them.
    fn take(
        &mut self,
        paused: &mut Paused<'_, OwnedFd>,
        count: u64,
        waiter: &Waiter,
        output: &mut Output,
    ) -> Result<Stop> {
        let Some(mut event) = paused.take(self.vcpu) else {
            let what = format!("the guest has not started vCPU {}", self.vcpu);
            return Err(Problem::new(what, "kvmictl regs shows which ones it has").into());
        };
        self.rip = event.arch.regs.rip;
        paused.control_singlestep(self.vcpu, true)?;
        let mut failures = 0;
        while self.executed < count {
            let line = Line::of(paused, &event, &self.names)?;
            paused.reply_event(&event, Action::Continue)?;
            event = match self.wait(paused, waiter)? {
                Ok(event) => event,
                Err(stop) => return Ok(stop),
            };
            self.rip = event.arch.regs.rip;
            let executed = event.kind == VcpuEventKind::Singlestep { failed: false };
            line.executed(executed).print(output)?;
            if executed {
                self.executed += 1;
                failures = 0;
                continue;
            }
            failures += 1;
            if failures > MOST_FAILURES {
                let what = format!("vCPU {} does not get to its next instruction", self.vcpu);
                return Err(Problem::new(what, "try again later").into());
            }
        }
        paused.control_singlestep(self.vcpu, false)?;
        paused.reply_event(&event, Action::Continue)?;
        Ok(Stop::Count)
    }

    /// Waits until the vCPU has something to tell, or it is time to stop.
    fn wait<S: AsFd>(
        &self,
        vm: &mut Connection<S>,
        waiter: &Waiter,
    ) -> Result<std::result::Result<VcpuEvent, Stop>> {
        loop {
            if let Some(event) = stepper::next_event(vm, self.vcpu, LOOK)? {
                return Ok(Ok(event));
            }
            match waiter.wait_for_message(Some(Duration::ZERO))? {
                None | Some(End::Timeout) => {}
                Some(End::Signal) => return Ok(Err(Stop::Signal)),
                Some(End::VmEnded | End::ToolHungUp) => return Ok(Err(Stop::VmEnded)),
            }
        }
    }

    fn end(&self, after: Duration, stop: Stop, output: &mut Output) -> Result<()> {
        let seconds = after.as_secs_f64();
        if output.is_json() {
            return Ok(output.json(&json!({
                "state": "ended",
                "pid": self.pid,
                "reason": stop.reason(),
                "vcpu": self.vcpu,
                "instructions": self.executed,
                "rip": hex(self.rip),
                "symbol": self.names.json(self.rip),
                "seconds": seconds,
            }))?);
        }
        let mut line = format!("{} instructions of vCPU {}", self.executed, self.vcpu);
        line += &match stop {
            Stop::VmEnded => "; the VM has ended".to_owned(),
            _ => {
                let place = self.names.text(self.rip).map(|place| format!(" {place}"));
                format!(
                    "; it goes on at {:#x}{}",
                    self.rip,
                    place.unwrap_or_default()
                )
            }
        };
        Ok(output.line(line)?)
    }
}

impl Line {
    /// The instruction that a vCPU is about to execute.
    fn of<S: AsFd>(vm: &mut Connection<S>, event: &VcpuEvent, names: &Names) -> Result<Self> {
        let rip = event.arch.regs.rip;
        let instruction = Instruction::of(vm, event)?;
        let target = instruction.as_ref().and_then(Instruction::target);
        Ok(Self {
            rip: hex(rip),
            symbol: names.json(rip),
            bytes: instruction.as_ref().map(|code| hex::encode(code.bytes())),
            text: instruction.as_ref().map(Instruction::text),
            target: target.and_then(|target| names.json(target)),
            executed: false,
            places: (
                names.text(rip),
                target.and_then(|target| names.text(target)),
            ),
        })
    }

    fn executed(self, executed: bool) -> Self {
        Self { executed, ..self }
    }

    fn print(&self, output: &mut Output) -> Result<()> {
        if output.is_json() {
            output.json(self)?;
        } else {
            output.line(self.line())?;
        }
        Ok(output.flush()?)
    }

    fn line(&self) -> String {
        let (place, target) = &self.places;
        let mut line = self.rip.clone();
        if let Some(place) = place {
            line += &format!(" {place}");
        }
        let bytes = self.bytes.as_deref().unwrap_or("-");
        let text = self.text.as_deref().unwrap_or("(cannot be read)");
        line += &format!(": {bytes:<20} {text}");
        if let Some(target) = target {
            line += &format!(" <{target}>");
        }
        if !self.executed {
            line += " (put off: something else came first)";
        }
        line
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
        abi::wire::{Header, ReplyHead},
        Command,
    };

    /// A VM of two vCPUs, of which the second one has a NOP and a call of `schedule` at all
    /// addresses; `failed` tells for each step whether something else comes first.
    fn with_stepped<R>(
        failed: &[u8],
        test: impl FnOnce(&mut Connection<OwnedFd>) -> R,
    ) -> (R, Vec<String>) {
        let mut log = Vec::new();
        let mut steps = failed.iter();
        let (mut seq, mut stepping) = (10, false);
        let host = |header: &Header, payload: &[u8]| {
            let reply = |data: &[u8]| {
                let head = ReplyHead::success(header, data.len()).unwrap();
                [head.as_bytes(), data].concat()
            };
            match Command::from_id(header.id) {
                None => {
                    log.push(format!("reply to {} of vCPU {}", payload[9], payload[0]));
                    let Some(failed) = steps.next().filter(|_| payload[0] == 1 && stepping) else {
                        return Vec::new();
                    };
                    seq += 1;
                    vcpu_event(seq, 1, 19, &[*failed, 0, 0, 0, 0, 0, 0, 0])
                }
                Some(Command::VmGetInfo) => {
                    reply(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
                }
                Some(Command::VcpuGetInfo) => reply(&[0; 8]),
                Some(Command::VmPauseVcpu) => {
                    let vcpu = payload[0].into();
                    [reply(&[]), vcpu_event(u32::from(vcpu) + 1, vcpu, 1, &[])].concat()
                }
                Some(Command::VcpuControlSinglestep) => {
                    stepping = payload[8] == 1;
                    log.push(format!("stepping of vCPU {}: {stepping}", payload[0]));
                    reply(&[])
                }
                Some(Command::VcpuTranslateGva) => reply(&payload[8..]),
                _ => reply(&[0x90; 15][..payload[8].into()]),
            }
        };
        let outcome = with_script(host, test);
        (outcome, log)
    }

    fn take(vm: &mut Connection<OwnedFd>, vcpu: u16, count: u64) -> (Result<Stop>, u64) {
        let waiter = Waiter::new(None, vm.stream().as_fd()).unwrap();
        let mut paused = vm.pause_all(Duration::from_secs(5)).unwrap();
        let mut steps = Steps {
            pid: None,
            vcpu,
            names: Names::none(),
            executed: 0,
            rip: 0,
        };
        let mut output = Output::discard(true);
        let stop = steps.take(&mut paused, count, &waiter, &mut output);
        (stop, steps.executed)
    }

    #[test]
    fn vcpu_executes_so_many_instructions_while_the_others_stand_still() {
        let ((stop, executed), log) = with_stepped(&[0, 1, 0], |vm| take(vm, 1, 2));
        assert_eq!((stop.unwrap(), executed), (Stop::Count, 2));
        let expected = [
            "stepping of vCPU 1: true",
            "reply to 1 of vCPU 1",
            "reply to 19 of vCPU 1",
            "reply to 19 of vCPU 1",
            "stepping of vCPU 1: false",
            "reply to 19 of vCPU 1",
            "reply to 1 of vCPU 0",
        ];
        assert_eq!(log, expected);
    }

    #[test]
    fn vcpu_that_does_not_get_on_is_given_up() {
        let failed = [1; 2000];
        let ((stop, executed), _) = with_stepped(&failed, |vm| take(vm, 1, 1));
        let error = stop.unwrap_err();
        assert!(error.to_string().contains("does not get"), "{error}");
        assert_eq!(executed, 0);
    }

    #[test]
    fn absent_vcpu_is_an_error() {
        let ((stop, _), _) = with_stepped(&[], |vm| take(vm, 2, 1));
        assert!(stop.unwrap_err().to_string().contains("not started vCPU 2"));
    }

    #[test]
    fn line_has_the_instruction_and_the_names_of_places() {
        with_names(|names| {
            let rip = 0xffff_ffff_8120_0040;
            // call schedule
            let code = [&[0xe8, 0xbb, 0, 0, 0][..], &[0x90; 10]].concat();
            let mut event = crate::trace::tests::event(VcpuEventKind::Pause);
            event.arch.regs.rip = rip;
            let host = |header: &Header, payload: &[u8]| {
                let data = match Command::from_id(header.id) {
                    Some(Command::VcpuTranslateGva) => payload[8..].to_vec(),
                    _ => code.clone(),
                };
                let head = ReplyHead::success(header, data.len()).unwrap();
                [head.as_bytes(), &data].concat()
            };
            let line = with_script(host, |vm| Line::of(vm, &event, names)).unwrap();
            let text = line.line();
            let place = "0xffffffff81200040 entry_SYSCALL_64+0x0/0xc0: e8bb000000           ";
            assert!(text.starts_with(place), "{text}");
            assert!(
                text.contains("call 0xffffffff81200100 <schedule+0x0/0x100>"),
                "{text}"
            );
            assert!(
                text.ends_with("(put off: something else came first)"),
                "{text}"
            );
            let json = serde_json::to_value(line.executed(true)).unwrap();
            assert_eq!(json["bytes"], "e8bb000000");
            assert_eq!(json["target"]["symbol"], "schedule");
            assert_eq!(json["executed"], true);
        });
    }
}
