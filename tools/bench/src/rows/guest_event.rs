// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What a guest does by itself, and what it pays if a tool is asked about that.

use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{anyhow, ensure, Context as _, Result};
use kvmi_client::{Action, EventId};

use super::{
    event::{answer_first, round_trip},
    exit,
    fault::{PIECES, WORKING},
    message::{event_reply, event_size},
    Bench, Row,
};
use crate::{
    act::Act,
    figure::{Setting, Spread},
    program::Program,
    scene::{pin, Client, Hook, Scene, TOOL_CPU, VCPU_CPU},
    stage::{run_until, Stage, PLENTY},
};

pub const CPUID: &str = "exit to KVM (CPUID), all events on";
pub const WORK: &str = "work, all events on";

/// What is not asked about.
pub const ROWS: &[Row] = &[
    Row::everywhere("write to CR3", |bench| writing(bench, Act::Cr3)),
    Row::everywhere("write to CR4", |bench| writing(bench, Act::Cr4)),
    Row::everywhere("write to EFER", |bench| writing(bench, Act::Efer)),
    Row::hooked("write to CR3, CR events on, same value", same_value),
    Row::hooked(CPUID, cpuid),
    Row::hooked(WORK, |bench| working(bench, WORKING, track_all)),
    Row::hooked("work with context switches", |bench| {
        working(bench, SWITCHING, |_| Ok(()))
    }),
    Row::hooked("work with context switches, CR event, CONTINUE", switching),
];

/// From the reply to an event until the next one.
pub const EVENTS: &[Row] = &[
    Row::hooked("write to CR0, CR event, CONTINUE", |bench| {
        event(bench, Act::Cr0)
    }),
    Row::hooked("write to CR3, CR event, CONTINUE", |bench| {
        event(bench, Act::Cr3)
    }),
    Row::hooked("write to CR4, CR event, CONTINUE", |bench| {
        event(bench, Act::Cr4)
    }),
    Row::hooked("write to EFER, MSR event, CONTINUE", |bench| {
        event(bench, Act::Efer)
    }),
    Row::hooked("write to LSTAR, MSR event, CONTINUE", |bench| {
        event(bench, Act::Lstar)
    }),
    Row::hooked("INT3, BREAKPOINT event, CONTINUE", |bench| {
        event(bench, Act::Int3)
    }),
    Row::hooked("hypercall, HYPERCALL event, CONTINUE", |bench| {
        event(bench, Act::Hypercall)
    }),
    Row::hooked("SGDT, DESCRIPTOR event, CONTINUE", |bench| {
        event(bench, Act::Sgdt)
    }),
    Row::hooked("LGDT, DESCRIPTOR event, CONTINUE", |bench| {
        event(bench, Act::Lgdt)
    }),
    Row::hooked("SINGLESTEP event, CONTINUE", |bench| event(bench, Act::Nop)),
];

/// Times something is done per return to user space.
const TIMES: u32 = 100;
/// As [`WORKING`], with a context switch at the end of each piece.
const SWITCHING: Program = Program::SwitchOut(PIECES, PLENTY);

/// Has the vCPU ask about everything but single instructions.
fn track_all(client: &mut Client<'_>) -> Result<()> {
    [
        Act::Cr0,
        Act::Cr3,
        Act::Cr4,
        Act::Efer,
        Act::Lstar,
        Act::Int3,
        Act::Hypercall,
        Act::Sgdt,
    ]
    .into_iter()
    .try_for_each(|act| act.track(client))?;
    Ok(client.vcpu_control_events(0, EventId::Xsetbv, true)?)
}

/// One write to a register, with nobody to be asked.
fn writing(bench: &Bench<'_>, act: Act) -> Result<Spread> {
    one(bench, |times| Program::ActOut(act, times), |_| Ok(()))
}

/// One write that has an exit only because there would be an event if it changed anything.
fn same_value(bench: &Bench<'_>) -> Result<Spread> {
    let act = Act::SameCr3;
    one(
        bench,
        |times| Program::ActOut(act, times),
        |client| act.track(client),
    )
}

/// The exit that is measured without events, too.
fn cpuid(bench: &Bench<'_>) -> Result<Spread> {
    one(bench, Program::CpuidOut, track_all)
}

/// One of what a program does so often, with a tool that is asked about what does not happen.
fn one(
    bench: &Bench<'_>,
    program: impl Fn(u32) -> Program,
    track: impl Fn(&mut Client<'_>) -> Result<()> + Sync,
) -> Result<Spread> {
    let run = |times| {
        let mut stage = Stage::new(program(times), bench.setting, [])?;
        if bench.setting == Setting::Hooked {
            stage.command(&track)?;
        }
        bench.measure(|| exit::run(&mut stage.vcpu))
    };
    let (some, none) = (run(TIMES)?, run(0)?);
    Ok(some.share(none, TIMES))
}

/// Some work, with a tool that is asked about what does not happen.
fn working(
    bench: &Bench<'_>,
    program: Program,
    track: fn(&mut Client<'_>) -> Result<()>,
) -> Result<Spread> {
    let mut stage = Stage::new(program, bench.setting, [])?;
    stage.command(track)?;
    let bench = bench.fewer_rounds(10);
    bench.measure(|| exit::run(&mut stage.vcpu))
}

/// Some work, with a tool on another CPU that is asked about each of its context switches.
fn switching(bench: &Bench<'_>) -> Result<Spread> {
    let mut stage = Stage::new(SWITCHING, bench.setting, [])?;
    let hook = stage.hook.as_ref().context("the VM is not hooked")?;
    let bench = bench.fewer_rounds(10);
    let begun = AtomicBool::new(false);
    thread::scope(|scope| {
        let tool = scope.spawn(|| answer(hook, &begun));
        let vcpu = &mut stage.vcpu;
        let spread = run_until(vcpu, || begun.load(Ordering::Relaxed) || tool.is_finished())
            .and_then(|()| pin(VCPU_CPU))
            .and_then(|()| bench.measure(|| exit::run(vcpu)));
        hook.tool.shutdown(Shutdown::Both)?;
        pin(TOOL_CPU)?;
        let answered = tool
            .join()
            .map_err(|_| anyhow!("the tool has panicked"))??;
        let made = bench.rounds * PIECES as usize;
        ensure!(answered >= made, "{answered} of {made} context switches");
        spread
    })
}

/// Answers all CR events until the connection ends, says when the first one has been, and returns
/// how many there were.
fn answer(hook: &Hook, begun: &AtomicBool) -> Result<usize> {
    let mut client = hook.client();
    Act::Cr3.track(&mut client)?;
    answer_first(client, Action::Continue)?;
    begun.store(true, Ordering::Relaxed);
    let mut tool = &hook.tool;
    let mut message = vec![0; event_size(EventId::Cr)];
    let mut answered = 1;
    while tool.read_exact(&mut message).is_ok() {
        tool.write_all(&event_reply(&message, EventId::Cr, Action::Continue)?)?;
        answered += 1;
    }
    Ok(answered)
}

/// From the reply to the event of a guest that does nothing else until the next one.
fn event(bench: &Bench<'_>, act: Act) -> Result<Spread> {
    let scene = Scene::new(Program::ActCount(act), VCPU_CPU)?;
    let mut client = scene.hook.client();
    act.track(&mut client)?;
    round_trip(
        bench,
        client,
        &scene.hook.tool,
        act.event(),
        Action::Continue,
    )
}
