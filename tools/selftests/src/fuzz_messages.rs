// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Random messages: valid ones, nearly valid ones and nonsense.

use kvmi_abi::{wire::MAX_MSG_SIZE, Command, Scope};
use zerocopy::IntoBytes as _;

use crate::{
    tool::{check, range, write_payload},
    util::Rng,
    vcpu_fuzz::vcpu_request,
    vcpu_tool::vcpu_payload,
    vm::{MEMORY, PAGE, SCRATCH},
};

/// Fewer than `limit` random bytes.
fn random_bytes(rng: &mut Rng, limit: usize) -> Vec<u8> {
    let len = rng.below(limit);
    rng.bytes(len)
}

/// A valid command, more or less.
fn valid_command(rng: &mut Rng) -> (u16, Vec<u8>) {
    let pages = (MEMORY - SCRATCH as usize) / PAGE;
    let at = rng.below(PAGE);
    let gpa = SCRATCH + (rng.below(pages) * PAGE + at) as u64;
    let len = 1 + rng.below(PAGE - at);
    let flag = rng.below(2) as u8;
    let some_id = rng.below(32) as u16;
    let command = rng.pick(Command::ALL);
    let payload = match command {
        Command::GetVersion | Command::VmGetInfo => vec![],
        Command::VmCheckCommand | Command::VmCheckEvent => check(some_id).as_bytes().to_vec(),
        Command::VmControlEvents => vec![0, 0, flag, 0, 0, 0, 0, 0],
        Command::VmControlCleanup => vec![flag, 0, 0, 0, 0, 0, 0, 0],
        Command::VmReadPhysical => range(gpa, len as u16).as_bytes().to_vec(),
        Command::VmWritePhysical => write_payload(gpa, &rng.bytes(len)),
        _ if command.scope() == Scope::Vcpu => {
            vcpu_payload(rng.below(3) as u16, &vcpu_request(rng, command))
        }
        _ => random_bytes(rng, 600),
    };
    (command.id(), payload)
}

/// A random message: id, announced size, what follows the header.
pub fn random_message(rng: &mut Rng) -> (u16, u16, Vec<u8>) {
    let (mut id, mut payload) = valid_command(rng);
    match rng.below(16) {
        // Some bits are wrong.
        0..=3 => {
            for _ in 0..=rng.below(3) {
                let bit = rng.below(8 * payload.len().max(1));
                if let Some(byte) = payload.get_mut(bit / 8) {
                    *byte ^= 1 << (bit % 8);
                }
            }
        }
        // The first bytes are what programmers like.
        4 => {
            let value = rng.pick(&[0, 1, 0x7f, 0x80, 0xff]);
            let len = rng.below(17).min(payload.len());
            payload[..len].fill(value);
        }
        // Something is missing, or too much.
        5 => payload.truncate(rng.below(payload.len() + 1)),
        6 => payload.extend(random_bytes(rng, 64)),
        7 => payload.resize(MAX_MSG_SIZE, rng.next() as u8),
        // The payload is one of another command.
        8 => id = rng.next() as u16,
        9 => id = rng.below(32) as u16,
        // Pure chance.
        10 => {
            id = rng.next() as u16;
            payload = random_bytes(rng, MAX_MSG_SIZE + 1);
        }
        // A size that no message may have.
        11 if rng.one_in(4) => {
            let over = rng.below(usize::from(u16::MAX) - MAX_MSG_SIZE);
            return (id, (MAX_MSG_SIZE + 1 + over) as u16, vec![]);
        }
        // As it is.
        _ => {}
    }
    (id, payload.len() as u16, payload)
}
