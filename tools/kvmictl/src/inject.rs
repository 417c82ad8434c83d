// SPDX-License-Identifier: GPL-2.0 OR MIT

//! `kvmictl inject`

use std::{os::fd::AsFd, time::Duration};

use anyhow::{Context as _, Result};
use kvmi_client::{Action, Connection, Event, VcpuEvent, VcpuEventKind};
use serde::Serialize;

use crate::{
    cli,
    exception::Exception,
    output::{hex, Output},
    problem::Problem,
    session::Session,
};

/// How long the vCPU may take to get to the exception.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What has become of an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Delivered,
    Replaced(Exception),
    Lost,
}

/// An exception, as it is printed as JSON.
#[derive(Serialize)]
struct Printed {
    vector: u8,
    name: String,
    error_code: Option<String>,
    address: Option<String>,
}

/// What is printed as JSON.
#[derive(Serialize)]
struct Report {
    vcpu: u16,
    outcome: &'static str,
    requested: Printed,
    delivered: Option<Printed>,
}

/// Injects an exception.
pub fn run(arguments: &cli::Inject, output: &mut Output) -> Result<()> {
    let vcpu = arguments.vcpu;
    let code = arguments.error_code.into();
    let mut session = Session::open(&arguments.vm)?;
    session.check_vcpu(vcpu)?;
    let address = arguments
        .address
        .resolve(&arguments.symbols, &mut session)?;
    let requested = Exception::new(arguments.vector, code, address);
    let outcome = inject(&mut session.vm, vcpu, &requested)?;
    session.close()?;
    report(vcpu, &requested, outcome, output)
}

/// Injects an exception and waits until it is known what becomes of it.
fn inject<S: AsFd>(
    vm: &mut Connection<S>,
    vcpu: u16,
    requested: &Exception,
) -> Result<Outcome, anyhow::Error> {
    vm.inject_exception(
        vcpu,
        requested.vector.0,
        requested.error_code.unwrap_or_default(),
        requested.address.unwrap_or_default(),
    )?;
    let event = loop {
        let event = vm.wait_for_event(
            Some(TIMEOUT),
            |event| matches!(event, Event::Vcpu(event) if is_trap(event, vcpu)),
        );
        let event = event.context("the exception is injected, but what became of it is unknown")?;
        if let Event::Vcpu(event) = event {
            break event;
        }
    };
    vm.reply_event(&event, Action::Continue)?;
    Ok(match Exception::of_event(&event.kind) {
        Some(delivered) if delivered == *requested => Outcome::Delivered,
        Some(delivered) => Outcome::Replaced(delivered),
        None => Outcome::Lost,
    })
}

fn is_trap(event: &VcpuEvent, vcpu: u16) -> bool {
    event.vcpu == vcpu && matches!(event.kind, VcpuEventKind::Trap { .. })
}

fn report(vcpu: u16, requested: &Exception, outcome: Outcome, output: &mut Output) -> Result<()> {
    if output.is_json() {
        output.json(&Report::new(vcpu, requested, outcome))?;
    }
    let what = match outcome {
        Outcome::Delivered if output.is_json() => return Ok(()),
        Outcome::Delivered => {
            return Ok(output.line(format_args!("delivered to vCPU {vcpu}: {requested}"))?);
        }
        Outcome::Replaced(other) => {
            format!("vCPU {vcpu} gets another exception instead of {requested}: {other}")
        }
        Outcome::Lost => format!("{requested} got lost on vCPU {vcpu}"),
    };
    Err(Problem::new(what, "something else came first on this vCPU: try again").into())
}

impl Report {
    fn new(vcpu: u16, requested: &Exception, outcome: Outcome) -> Self {
        let (outcome, delivered) = match &outcome {
            Outcome::Delivered => ("delivered", Some(requested)),
            Outcome::Replaced(other) => ("replaced", Some(other)),
            Outcome::Lost => ("lost", None),
        };
        Self {
            vcpu,
            outcome,
            requested: requested.into(),
            delivered: delivered.map(Printed::from),
        }
    }
}

impl From<&Exception> for Printed {
    fn from(exception: &Exception) -> Self {
        Self {
            vector: exception.vector.0,
            name: exception.vector.to_string(),
            error_code: exception.error_code.map(hex),
            address: exception.address.map(hex),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        exception::Vector,
        memory::tests::{vcpu_event, with_script},
    };
    use kvmi_client::{
        abi::{vcpu::TrapEvent, wire::ReplyHead},
        Error, KvmiError,
    };

    /// Injects #PF into vCPU 1 of a VM that delivers `trap`.
    fn injected(trap: (u8, u32, u64)) -> Outcome {
        let requested = Exception::new(Vector(14), 2, 0x1000);
        let trap = TrapEvent {
            nr: trap.0,
            error_code: trap.1,
            address: trap.2,
            ..Default::default()
        };
        let trap = zerocopy_bytes(&trap);
        let mut seen = Vec::new();
        let outcome = with_script(
            |header, _| {
                seen.push(header.id);
                match header.id {
                    1 => Vec::new(),
                    // The other vCPU's event is none of our business.
                    _ => [
                        &vcpu_event(1, 0, 9, &trap),
                        ReplyHead::success(header, 0).unwrap().as_bytes(),
                        &vcpu_event(2, 1, 9, &trap),
                    ]
                    .concat(),
                }
            },
            |vm| inject(vm, 1, &requested),
        );
        assert_eq!(seen, [15, 1]);
        outcome.unwrap()
    }

    fn zerocopy_bytes(trap: &TrapEvent) -> Vec<u8> {
        let mut bytes = vec![trap.nr, 0, 0, 0];
        bytes.extend(trap.error_code.to_ne_bytes());
        bytes.extend(trap.address.to_ne_bytes());
        bytes
    }

    #[test]
    fn outcome_is_what_the_event_says() {
        assert_eq!(injected((14, 2, 0x1000)), Outcome::Delivered);
        for other in [(14, 3, 0x1000), (14, 2, 0x2000), (13, 2, 0x1000)] {
            let exception = Exception::new(Vector(other.0), other.1, other.2);
            assert_eq!(injected(other), Outcome::Replaced(exception));
        }
        assert_eq!(injected((0xff, 0, 0)), Outcome::Lost);
    }

    #[test]
    fn refusal_is_an_error() {
        let requested = Exception::new(Vector(6), 0, 0);
        let outcome = with_script(
            |header, _| {
                ReplyHead::failure(header, KvmiError::Busy)
                    .as_bytes()
                    .to_vec()
            },
            |vm| inject(vm, 0, &requested),
        );
        let error = outcome.unwrap_err();
        let error = error.downcast_ref::<Error>().unwrap();
        assert!(matches!(error, Error::Kvmi(KvmiError::Busy, _)));
    }

    #[test]
    fn report_names_both_exceptions() {
        let requested = Exception::new(Vector(6), 0, 0);
        let other = Exception::new(Vector(14), 2, 0x1000);
        let report = Report::new(0, &requested, Outcome::Replaced(other));
        assert_eq!(report.requested.name, "#UD");
        let delivered = report.delivered.unwrap();
        assert_eq!(
            (delivered.vector, delivered.error_code),
            (14, Some("0x2".to_owned()))
        );
        assert!(Report::new(0, &requested, Outcome::Lost)
            .delivered
            .is_none());
    }
}
