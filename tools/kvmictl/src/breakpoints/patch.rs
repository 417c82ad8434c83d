// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Breakpoints in the guest's memory.

use std::os::fd::AsFd;

use anyhow::Result;
use kvmi_client::{Connection, Error};

use crate::{output::hex, problem::Problem};

/// The breakpoint instruction, INT3.
pub const INT3: u8 = 0xcc;

/// A breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Where it is, as it was given.
    pub gva: u64,
    /// Where that is in the guest's memory.
    pub gpa: u64,
    /// What belongs there.
    original: u8,
}

impl Patch {
    /// Puts what belongs there in its place.
    pub fn take_out<S: AsFd>(&self, vm: &mut Connection<S>) -> Result<(), Error> {
        vm.write_physical(self.gpa, &[self.original])
    }

    /// Puts the breakpoint in its place.
    pub fn put_in<S: AsFd>(&self, vm: &mut Connection<S>) -> Result<(), Error> {
        vm.write_physical(self.gpa, &[INT3])
    }

    /// Takes the breakpoint out if it is there: whatever else is, the guest has written.
    fn remove<S: AsFd>(&self, vm: &mut Connection<S>) -> Result<(), Error> {
        let mut byte = [0];
        vm.read_physical(self.gpa, &mut byte)?;
        match byte {
            [INT3] => self.take_out(vm),
            _ => Ok(()),
        }
    }
}

/// All breakpoints, each at another place.
#[derive(Debug, Default)]
pub struct Patches(Vec<Patch>);

impl Patches {
    /// Puts breakpoints into the memory of a guest that stands still: virtual addresses, and where
    /// they are. Also gives those that may be there if not all could be put in.
    pub fn insert<S: AsFd>(vm: &mut Connection<S>, places: &[(u64, u64)]) -> (Self, Result<()>) {
        let mut patches = Self::default();
        let outcome = places
            .iter()
            .try_for_each(|(gva, gpa)| patches.add(vm, *gva, *gpa));
        (patches, outcome)
    }

    fn add<S: AsFd>(&mut self, vm: &mut Connection<S>, gva: u64, gpa: u64) -> Result<()> {
        if self.at(gpa).is_some() {
            return Ok(());
        }
        let mut byte = [0];
        vm.read_physical(gpa, &mut byte)?;
        let [original] = byte;
        if original == INT3 {
            let what = format!("the guest has a breakpoint of its own at {}", hex(gva));
            let hint = "whoever has it there (kprobes, a debugger) could not be told from this";
            return Err(Problem::new(what, hint).into());
        }
        let patch = Patch { gva, gpa, original };
        // Before it is known to be there: the reply may get lost.
        self.0.push(patch);
        Ok(patch.put_in(vm)?)
    }

    /// The breakpoint at a guest physical address.
    pub fn at(&self, gpa: u64) -> Option<&Patch> {
        self.0.iter().find(|patch| patch.gpa == gpa)
    }

    /// All of them.
    pub fn all(&self) -> &[Patch] {
        &self.0
    }

    /// Takes all breakpoints out. All are tried; the error is that of the first one that stays.
    pub fn remove<S: AsFd>(&self, vm: &mut Connection<S>) -> Result<(), Error> {
        let mut outcome = Ok(());
        for patch in &self.0 {
            outcome = outcome.and(patch.remove(vm));
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::with_script;
    use kvmi_client::{
        abi::wire::{Header, ReplyHead},
        Command, KvmiError,
    };
    use std::collections::BTreeMap;

    /// A VM that has some bytes.
    fn with_bytes<R>(
        bytes: &mut BTreeMap<u64, u8>,
        test: impl FnOnce(&mut Connection<std::os::fd::OwnedFd>) -> R,
    ) -> R {
        let host = |header: &Header, payload: &[u8]| {
            let gpa = u64::from_ne_bytes(payload[..8].try_into().unwrap());
            let Some(byte) = bytes.get_mut(&gpa) else {
                let head = ReplyHead::failure(header, KvmiError::NoEnt);
                return head.as_bytes().to_vec();
            };
            let data = match Command::from_id(header.id) {
                Some(Command::VmReadPhysical) => vec![*byte],
                _ => {
                    *byte = payload[16];
                    vec![]
                }
            };
            let head = ReplyHead::success(header, data.len()).unwrap();
            [head.as_bytes(), &data].concat()
        };
        with_script(host, test)
    }

    /// Puts breakpoints in.
    fn insert(bytes: &mut BTreeMap<u64, u8>, places: &[(u64, u64)]) -> Patches {
        let (patches, outcome) = with_bytes(bytes, |vm| Patches::insert(vm, places));
        outcome.unwrap();
        patches
    }

    #[test]
    fn memory_is_as_before_when_the_breakpoints_are_out() {
        let mut bytes = BTreeMap::from([(0x1000, 0x55), (0x2000, 0x41)]);
        let places = [(0xf1000, 0x1000), (0xf2000, 0x2000), (0xe1000, 0x1000)];
        let patches = insert(&mut bytes, &places);
        assert_eq!(bytes, BTreeMap::from([(0x1000, INT3), (0x2000, INT3)]));
        assert_eq!(patches.all().len(), 2);
        assert_eq!(patches.at(0x1000).map(|patch| patch.gva), Some(0xf1000));
        assert_eq!(patches.at(0x1001), None);

        with_bytes(&mut bytes, |vm| patches.at(0x1000).unwrap().take_out(vm)).unwrap();
        assert_eq!(bytes[&0x1000], 0x55);
        with_bytes(&mut bytes, |vm| patches.at(0x1000).unwrap().put_in(vm)).unwrap();
        assert_eq!(bytes[&0x1000], INT3);
        with_bytes(&mut bytes, |vm| patches.remove(vm)).unwrap();
        assert_eq!(bytes, BTreeMap::from([(0x1000, 0x55), (0x2000, 0x41)]));
    }

    #[test]
    fn those_that_were_put_in_are_known_if_others_were_not() {
        for (last, bytes) in [(0x3000, None), (0x3000, Some(INT3))] {
            let mut bytes: BTreeMap<u64, u8> =
                bytes.map(|byte| (0x3000, byte)).into_iter().collect();
            bytes.insert(0x1000, 0x55);
            let before = bytes.clone();
            let places = [(0xf1000, 0x1000), (0xf3000, last)];
            let (patches, outcome) = with_bytes(&mut bytes, |vm| Patches::insert(vm, &places));
            outcome.unwrap_err();
            assert_eq!(bytes[&0x1000], INT3);
            with_bytes(&mut bytes, |vm| patches.remove(vm)).unwrap();
            assert_eq!(bytes, before);
        }
    }

    #[test]
    fn one_whose_reply_gets_lost_is_known() {
        let mut byte = 0x55;
        let host = |header: &Header, payload: &[u8]| {
            let data = match Command::from_id(header.id) {
                Some(Command::VmReadPhysical) => vec![byte],
                _ => {
                    byte = payload[16];
                    // No reply to anything that was asked.
                    return ReplyHead::failure(&Header::default(), KvmiError::Inval)
                        .as_bytes()
                        .to_vec();
                }
            };
            let head = ReplyHead::success(header, data.len()).unwrap();
            [head.as_bytes(), &data].concat()
        };
        let (patches, outcome) = with_script(host, |vm| Patches::insert(vm, &[(0xf1000, 0x1000)]));
        outcome.unwrap_err();
        assert_eq!(byte, INT3);
        assert_eq!(patches.all().len(), 1);
    }

    #[test]
    fn what_the_guest_has_written_stays() {
        let mut bytes = BTreeMap::from([(0x1000, 0x55), (0x2000, 0x41)]);
        let places = [(0xf1000, 0x1000), (0xf2000, 0x2000)];
        let patches = insert(&mut bytes, &places);
        bytes.insert(0x1000, 0xe9);
        with_bytes(&mut bytes, |vm| patches.remove(vm)).unwrap();
        assert_eq!(bytes, BTreeMap::from([(0x1000, 0xe9), (0x2000, 0x41)]));
        // One that is gone does not keep the others.
        with_bytes(&mut bytes, |vm| patches.at(0x2000).unwrap().put_in(vm)).unwrap();
        bytes.remove(&0x1000);
        with_bytes(&mut bytes, |vm| patches.remove(vm)).unwrap_err();
        assert_eq!(bytes[&0x2000], 0x41);
    }
}
