// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The tracepoints, as those who watch the host see them in tracefs.

use std::{fs, io, path::PathBuf};

use kvmi_abi::{ioctl::Hook, Command, Event, KvmiError};

use crate::{
    harness::{skip, test, Ctx, Test},
    sys,
    tool::Tool,
    util::wait_for,
    vm::{Guest, TestVm, MEMORY},
};

const AREA: &str = "tracing";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(session_is_told_from_hook_to_unhook),
    test!(events_and_their_replies_are_told),
    test!(refused_hooks_are_not_told),
    test!(nothing_is_told_while_switched_off),
];

const TRACEFS: &str = "/sys/kernel/tracing";

/// A trace buffer of this test's own, which takes all tracepoints of the module.
struct Trace {
    instance: PathBuf,
}

/// What a tracepoint has told: its name, and the rest of the line.
type Line = (String, String);

impl Trace {
    /// Begins to trace; skips the test if that cannot be done here.
    fn start() -> Self {
        if !PathBuf::from(TRACEFS).join("instances").exists() {
            skip("no tracefs in /sys/kernel/tracing");
        }
        let name = format!("instances/kvmi_test-{}", std::process::id());
        let instance = PathBuf::from(TRACEFS).join(name);
        fs::create_dir(&instance).expect("a trace buffer can be made");
        let trace = Self { instance };
        trace.switch(true);
        trace
    }

    fn switch(&self, on: bool) {
        let path = self.instance.join("events/kvmi/enable");
        match fs::write(&path, if on { "1" } else { "0" }) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                panic!("the module has no tracepoints: {error}")
            }
            written => written.expect("tracepoints can be switched"),
        }
    }

    /// What was told about VMs of this process, in order.
    fn lines(&self) -> Vec<Line> {
        let text = fs::read_to_string(self.instance.join("trace"));
        let text = text.expect("a trace buffer can be read");
        let mine = format!(" vmm={} ", std::process::id());
        text.lines()
            .filter_map(|line| line.split_once(": kvmi_"))
            .filter_map(|(_, line)| line.split_once(": "))
            .filter(|(_, fields)| format!("{fields} ").contains(&mine))
            .map(|(name, fields)| (name.to_owned(), fields.to_owned()))
            .collect()
    }

    /// The lines of one tracepoint, without what they have in common: the session and the VMM.
    fn of(&self, tracepoint: &str, session: u32) -> Vec<String> {
        let common = format!("session={session} vmm={}", std::process::id());
        let lines = self.lines().into_iter();
        lines
            .filter(|(name, _)| name == tracepoint)
            .filter_map(|(_, fields)| Some(fields.strip_prefix(&common)?.trim().to_owned()))
            .collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // If that fails, the buffer is left for whoever looks for the reason.
        let _ = fs::remove_dir(&self.instance);
    }
}

/// Hooks a VM to a tool that may do everything; returns the number of the session, too.
#[track_caller]
fn hook(vm: &TestVm, trace: &Trace) -> (Tool, u32) {
    let before = trace.lines().len();
    let tool = vm.hook_allowing_all();
    let lines = trace.lines();
    let (name, fields) = &lines[before];
    assert_eq!(name, "hook");
    let session = fields.split_whitespace().next().expect("the first field");
    let session = session.strip_prefix("session=").expect("its name");
    (tool, session.parse().expect("a number"))
}

fn session_is_told_from_hook_to_unhook(_: &Ctx) {
    let trace = Trace::start();
    let vm = TestVm::running(Guest::Count64, 1);
    let hook = Hook {
        fd: -1,
        uuid: *b"0123456789abcdef",
        ..Default::default()
    };
    let mut tool = Tool::new();
    let hooked = sys::hook_with(
        &vm,
        Hook {
            fd: tool.vmm_fd(),
            ..hook
        },
    );
    assert_eq!(hooked, Ok(()));
    sys::allow_all(&vm);
    let (info, read) = (Command::VcpuGetInfo.id(), Command::VmReadPhysical.id());
    tool.version();
    assert!(tool.vcpu_info(0).is_ok());
    assert!(tool.read(0, 16).is_ok());
    assert_eq!(tool.read(MEMORY as u64, 16), Err(KvmiError::NoEnt));
    assert_eq!(tool.call_raw(999, &[0; 5]), Err(KvmiError::NoSys));
    vm.unhook();

    let pid = std::process::id();
    let lines = trace.lines();
    let (_, fields) = lines.first().expect("the hook is told");
    let number = fields.split_once(' ').expect("several fields").0;
    let expected = [
        format!(
            "hook: {number} vmm={pid} hooked_by={pid} uuid=30313233-3435-3637-3839-616263646566"
        ),
        format!("command: {number} vmm={pid} vcpu=-1 id=2 seq=1 size=0"),
        format!("reply: {number} vmm={pid} id=2 seq=1 error=0 size=16"),
        format!("command: {number} vmm={pid} vcpu=0 id={info} seq=2 size=8"),
        format!("reply: {number} vmm={pid} id={info} seq=2 error=0 size=8"),
        format!("command: {number} vmm={pid} vcpu=-1 id={read} seq=3 size=16"),
        format!("reply: {number} vmm={pid} id={read} seq=3 error=0 size=16"),
        format!("command: {number} vmm={pid} vcpu=-1 id={read} seq=4 size=16"),
        format!("reply: {number} vmm={pid} id={read} seq=4 error=-2 size=0"),
        format!("command: {number} vmm={pid} vcpu=-1 id=999 seq=5 size=5"),
        format!("reply: {number} vmm={pid} id=999 seq=5 error=-1000 size=0"),
        format!("unhook: {number} vmm={pid}"),
    ];
    let told: Vec<_> = lines
        .iter()
        .map(|(name, fields)| format!("{name}: {fields}"))
        .collect();
    assert_eq!(told, expected);
}

fn events_and_their_replies_are_told(_: &Ctx) {
    let trace = Trace::start();
    let vm = TestVm::running(Guest::Count64, 2);
    let (mut tool, session) = hook(&vm, &trace);
    for vcpu in [1, 0] {
        let paused = tool.pause(vcpu);
        tool.resume(&paused);
        vm.expect_progress_of(vcpu.into());
    }
    assert_eq!(tool.control_event(Event::Unhook, true), Ok(()));
    assert_eq!(sys::preunhook(&vm), Ok(()));
    assert_eq!(tool.unhook_event(), 3);
    let paused = tool.pause(0);
    tool.resume(&paused);
    vm.expect_progress_of(0);

    let events = [
        "vcpu=1 event=1 seq=1",
        "vcpu=0 event=1 seq=2",
        "vcpu=-1 event=0 seq=3",
        "vcpu=0 event=1 seq=4",
    ];
    assert_eq!(trace.of("event", session), events);
    let replies = [
        "vcpu=1 event=1 action=0 seq=1",
        "vcpu=0 event=1 action=0 seq=2",
        "vcpu=0 event=1 action=0 seq=4",
    ];
    assert_eq!(trace.of("event_reply", session), replies);
    // No event is answered before it is told.
    let lines = trace.lines();
    let at = |name: &str, seq: u32| {
        let seq = format!(" seq={seq}");
        let found = lines
            .iter()
            .position(|(n, f)| n == name && f.ends_with(&seq));
        found.expect("it is told")
    };
    assert!([1, 2, 4]
        .iter()
        .all(|seq| at("event", *seq) < at("event_reply", *seq)));

    // The next session has another number, and events of its own.
    vm.unhook();
    let (mut tool, next) = hook(&vm, &trace);
    assert_ne!(next, session);
    let paused = tool.pause(0);
    tool.resume(&paused);
    assert_eq!(trace.of("event", next), ["vcpu=0 event=1 seq=1"]);
    wait_for("the reply is told", || {
        trace.of("event_reply", next) == ["vcpu=0 event=1 action=0 seq=1"]
    });
}

fn refused_hooks_are_not_told(_: &Ctx) {
    let trace = Trace::start();
    let vm = TestVm::counting(1);
    assert_eq!(sys::hook(&vm, -1), Err(sys::Errno::INVAL));
    let tool = vm.hook();
    let other = Tool::new();
    assert_eq!(sys::hook(&vm, other.vmm_fd()), Err(sys::Errno::EXIST));
    // The end of the tool unhooks nothing.
    let _vmm_end = tool.disconnect();
    vm.expect_progress();
    let names = || -> Vec<_> { trace.lines().into_iter().map(|(name, _)| name).collect() };
    assert_eq!(names(), ["hook"]);
    vm.unhook();
    vm.unhook();
    assert_eq!(names(), ["hook", "unhook"]);
}

fn nothing_is_told_while_switched_off(_: &Ctx) {
    let trace = Trace::start();
    let vm = TestVm::counting(1);
    let (mut tool, session) = hook(&vm, &trace);
    tool.version();
    assert_eq!(trace.of("command", session).len(), 1);
    trace.switch(false);
    tool.version();
    assert!(tool.vcpu_info(0).is_ok());
    trace.switch(true);
    tool.version();
    let told = trace.of("command", session);
    let expected = [1, 4].map(|seq| format!("vcpu=-1 id=2 seq={seq} size=0"));
    assert_eq!(told, expected);
}
