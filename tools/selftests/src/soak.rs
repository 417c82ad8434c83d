// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Everything at once for a while, and sessions that end in the middle of it.
//!
//! Here the tool is the client crate: several threads share each connection, and each of their
//! commands must get its reply, once, or the end of the connection.

use std::{
    os::unix::net::UnixStream,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread::scope,
    time::{Duration, Instant},
};

use kvmi_client::{
    Action, Connection, Error, Event, EventId, Hub, KvmiError, ProtocolError, VcpuEvent,
    VcpuEventKind,
};

use crate::{
    harness::{note, test, Ctx, Test},
    sys::{self, Errno},
    util::{soon, Rng},
    vcpu_stress::{disturb, SLOT_GPA},
    vm::{Guest, TestVm, MEMORY, PAGE, SCRATCH},
};

const AREA: &str = "soak";

/// The tests of this file.
pub const TESTS: &[Test] = &[
    test!(one_vcpu_survives_everything_at_once).timed(),
    test!(four_vcpus_survive_everything_at_once).timed(),
];

/// Threads of a tool that give commands.
const CLIENTS: u64 = 4;

/// How long a session lasts at most, before it ends in one way or another.
const SESSION: Duration = Duration::from_millis(400);

/// What was done.
#[derive(Default)]
struct Done {
    replies: AtomicU64,
    refusals: AtomicU64,
    /// Commands whose session ended before their reply.
    cut: AtomicU64,
    events: AtomicU64,
    hooks: AtomicU64,
}

impl Done {
    /// Whether commands succeeded and events came.
    fn is_representative(&self) -> bool {
        let number = |of: &AtomicU64| of.load(Ordering::Relaxed);
        number(&self.replies) > number(&self.refusals) && number(&self.events) != 0
    }
}

fn count(what: &AtomicU64) {
    what.fetch_add(1, Ordering::Relaxed);
}

fn everything_at_once(ctx: &Ctx, vcpus: u16) {
    note!("seed {}", ctx.seed());
    let vm = TestVm::running(Guest::Count64, vcpus.into());
    let mut rng = ctx.rng();
    let (done, stop) = (Done::default(), AtomicBool::new(false));
    let (begun, time) = (Instant::now(), ctx.duration(Duration::from_secs(10)));
    let mut others = [Rng::new(rng.next()), Rng::new(rng.next())];
    let [signals, pages] = &mut others;
    scope(|scope| {
        // While pages are taken from the guest, KVM itself may hold up changes of slots.
        scope.spawn(|| disturb(&vm, vcpus.into(), signals, soon(), &stop));
        scope.spawn(|| churn(&vm, pages, &stop));
        // On a slow machine a short time may do for no event at all.
        while begun.elapsed() < time || !done.is_representative() {
            session(&vm, vcpus, &mut rng, &done);
            vm.expect_progress();
        }
        stop.store(true, Ordering::SeqCst);
    });
    let seconds = begun.elapsed().as_secs_f64();
    let [replies, refusals, cut, events, hooks] = [
        done.replies,
        done.refusals,
        done.cut,
        done.events,
        done.hooks,
    ]
    .map(AtomicU64::into_inner);
    note!(
        "{seconds:.1} s: {replies} replies ({:.0}/s, {refusals} of them refusals), {events} events, \
         {hooks} hooks, {cut} commands cut off",
        replies as f64 / seconds
    );
    vm.expect_usable();
}

fn one_vcpu_survives_everything_at_once(ctx: &Ctx) {
    everything_at_once(ctx, 1);
}

fn four_vcpus_survive_everything_at_once(ctx: &Ctx) {
    everything_at_once(ctx, 4);
}

/// Takes memory that the guest does not use away from it, to be given back when somebody needs it.
fn churn(vm: &TestVm, rng: &mut Rng, stop: &AtomicBool) {
    let first = SCRATCH as usize / PAGE;
    while !stop.load(Ordering::SeqCst) {
        let page = first + rng.below(MEMORY / PAGE - first);
        let pages = 1 + rng.below(MEMORY / PAGE - page);
        vm.memory.discard(page * PAGE, pages * PAGE);
        rng.pause(Duration::from_millis(2));
    }
}

/// Hooks the VM, uses it from several threads, and ends that in a random way.
fn session(vm: &TestVm, vcpus: u16, rng: &mut Rng, done: &Done) {
    let (stream, _vmm_end) = vm.hook_allowing_all().into_ends();
    count(&done.hooks);
    let mut first = Connection::new(stream);
    first.set_timeout(Some(soon()));
    let announced = rng.one_in(2);
    let enabled = first.control_events(EventId::Unhook, announced);
    enabled.expect("an event can be switched");
    let (events, hub) = first.share().expect("a connection can be shared");
    scope(|scope| {
        let listener = Rng::new(rng.next());
        scope.spawn(move || listen(events, listener, done));
        for _ in 0..CLIENTS {
            let client = Client::new(&hub, Rng::new(rng.next()), vcpus, done);
            scope.spawn(move || client.work());
        }
        rng.pause(SESSION);
        match rng.below(3) {
            0 => {
                hub.connection().hang_up();
                vm.expect_progress();
            }
            1 => match sys::preunhook(vm) {
                Ok(()) => assert!(announced),
                Err(error) => assert_eq!((error, announced), (Errno::NOENT, false)),
            },
            _ => {}
        }
        vm.unhook();
    });
}

/// Whether this is how a session may end: between two messages, or inside of one.
fn is_end(error: &Error) -> bool {
    matches!(
        error,
        Error::Closed | Error::Protocol(ProtocolError::EndInsideMessage)
    )
}

/// Gets the events and replies to them, not always at once nor in their order.
fn listen(mut vm: Connection<UnixStream>, mut rng: Rng, done: &Done) {
    let mut held: Vec<VcpuEvent> = Vec::new();
    loop {
        let patience = match held.is_empty() {
            true => soon(),
            false => Duration::from_millis(rng.below(4) as u64),
        };
        match vm.next_event(Some(patience)) {
            Ok(Event::Vcpu(event)) => {
                let known = matches!(
                    event.kind,
                    VcpuEventKind::Pause | VcpuEventKind::Trap { .. }
                );
                assert!(known, "{event:?}");
                let same = held.iter().any(|held| held.vcpu == event.vcpu);
                assert!(!same, "two events of vCPU {} at once", event.vcpu);
                held.push(*event);
                count(&done.events);
                if rng.one_in(2) {
                    continue;
                }
            }
            // The VMM goes on without us if we take our time.
            Ok(Event::Unhook { .. }) if rng.one_in(2) => return vm.hang_up(),
            Ok(Event::Unhook { .. }) | Err(Error::Timeout) => {}
            Ok(event) => panic!("{event:?}"),
            Err(error) if is_end(&error) => return,
            Err(error) => panic!("no event: {error}"),
        }
        if held.is_empty() {
            continue;
        }
        let event = held.swap_remove(rng.below(held.len()));
        let set = match rng.one_in(4) {
            true => vm.set_registers(event.vcpu, &event.arch.regs),
            false => Ok(()),
        };
        match set.and_then(|()| vm.reply_event(&event, Action::Continue)) {
            Ok(()) => {}
            Err(error) if is_end(&error) => return,
            Err(error) => panic!("{event:?} cannot be replied to: {error}"),
        }
    }
}

/// A thread that gives commands.
struct Client<'a> {
    vm: Connection<UnixStream>,
    rng: Rng,
    vcpus: u16,
    done: &'a Done,
}

impl<'a> Client<'a> {
    fn new(hub: &Hub<UnixStream>, rng: Rng, vcpus: u16, done: &'a Done) -> Self {
        let mut vm = hub.connection();
        vm.set_timeout(Some(soon()));
        Self {
            vm,
            rng,
            vcpus,
            done,
        }
    }

    /// Gives commands until the session ends.
    fn work(mut self) {
        loop {
            match self.command() {
                Ok(()) => {}
                Err(Error::Kvmi(..) | Error::Unmapped(_)) => count(&self.done.refusals),
                Err(error) if is_end(&error) => return count(&self.done.cut),
                Err(error) => panic!("neither a reply nor the end: {error}"),
            }
            count(&self.done.replies);
        }
    }

    /// Gives a command; refusals that are to be expected are none.
    fn command(&mut self) -> Result<(), Error> {
        let (vm, rng) = (&mut self.vm, &mut self.rng);
        let vcpu = rng.below(self.vcpus.into()) as u16;
        let number = rng.next();
        let (outcome, refusal) = match rng.below(16) {
            0 => (vm.get_version().map(drop), None),
            1 => {
                let info = vm.get_info();
                let counted = info.map(|info| assert_eq!(info.vcpu_count, self.vcpus.into()));
                (counted, None)
            }
            2 => (vm.pause_vcpu(vcpu, rng.one_in(2)), None),
            3 => {
                let mut page = [0; PAGE];
                (vm.read_physical(SCRATCH, &mut page), None)
            }
            4 => {
                let gpa = SCRATCH + number % (MEMORY as u64 - SCRATCH - 8);
                (vm.write_physical(gpa, &number.to_ne_bytes()), None)
            }
            // It comes and goes.
            5 => (vm.write_physical(SLOT_GPA, &[1]), Some(KvmiError::NoEnt)),
            6 => {
                let nr = rng.pick(&[0, 6, 13, 14, 17]);
                let injected = vm.inject_exception(vcpu, nr, 2, number);
                (injected, Some(KvmiError::Busy))
            }
            7 => {
                let regs = vm.get_registers(vcpu, &[0xc000_0082, 0x10]);
                (regs.map(drop), None)
            }
            8 => (vm.get_xcr0(vcpu).map(drop), None),
            9 => (vm.get_cpuid(vcpu, 1, 0).map(drop), Some(KvmiError::NoEnt)),
            10 => (vm.translate_gva(vcpu, number).map(drop), None),
            11 => (vm.get_mtrr_type(vcpu, number >> 30).map(drop), None),
            12 => (vm.vcpu_info(vcpu).map(drop), None),
            13 => {
                let area = vm.get_xsave(vcpu);
                (area.and_then(|area| vm.set_xsave(vcpu, &area)), None)
            }
            14 => {
                let mut byte = [0];
                (vm.read_virtual(vcpu, SCRATCH, &mut byte), None)
            }
            _ => (vm.check_event(EventId::Trap), None),
        };
        match &outcome {
            Err(Error::Kvmi(error, command)) if Some(*error) != refusal => {
                panic!("{} refused: {error}", command.name())
            }
            _ => outcome,
        }
    }
}
