// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The registers of a vCPU.

use kvmi_abi::{
    arch::{Regs, Sregs},
    vcpu::{GetRegistersReply, MsrEntry},
};
use zerocopy::FromBytes as _;

use crate::error::ProtocolError;

/// Registers of a vCPU, all of the same moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Default operand size of the code being run, in bytes: 2, 4 or 8.
    pub mode: u32,
    /// General registers.
    pub regs: Regs,
    /// System registers.
    pub sregs: Sregs,
    /// The MSRs that were asked for, in that order: which one, and its value.
    pub msrs: Vec<(u32, u64)>,
}

impl Registers {
    /// Takes the registers from a reply that has to have the MSRs `asked` for.
    pub(crate) fn decode(data: &[u8], asked: &[u32]) -> Result<Self, ProtocolError> {
        let wanted = size_of::<GetRegistersReply>() + size_of_val(asked) * ENTRY_PER_INDEX;
        let size = ProtocolError::Size {
            got: data.len(),
            wanted,
        };
        let (head, entries) = GetRegistersReply::read_from_prefix(data).map_err(|_| size)?;
        if usize::try_from(head.nmsrs) != Ok(asked.len()) {
            return Err(ProtocolError::WrongMsrs);
        }
        if data.len() < wanted {
            return Err(size);
        }
        let msrs: Vec<_> = entries
            .chunks_exact(size_of::<MsrEntry>())
            .zip(asked)
            .filter_map(|(entry, asked)| {
                let entry = MsrEntry::read_from_bytes(entry).ok()?;
                (entry.index == *asked).then_some((entry.index, entry.data))
            })
            .collect();
        if msrs.len() != asked.len() {
            return Err(ProtocolError::WrongMsrs);
        }
        Ok(Self {
            mode: head.mode,
            regs: head.regs,
            sregs: head.sregs,
            msrs,
        })
    }
}

/// How many times as large as the index of an MSR the entry in the reply is.
const ENTRY_PER_INDEX: usize = size_of::<MsrEntry>() / size_of::<u32>();

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes as _;

    fn reply(nmsrs: u32, msrs: &[(u32, u64)]) -> Vec<u8> {
        let head = GetRegistersReply {
            mode: 8,
            nmsrs,
            ..Default::default()
        };
        let mut data = head.as_bytes().to_vec();
        for (index, value) in msrs {
            let entry = MsrEntry {
                index: *index,
                reserved: 0,
                data: *value,
            };
            data.extend(entry.as_bytes());
        }
        data
    }

    #[test]
    fn msrs_come_with_their_values() {
        let msrs = [(0xc000_0082, 5), (0x10, u64::MAX)];
        let registers = Registers::decode(&reply(2, &msrs), &[0xc000_0082, 0x10]).unwrap();
        assert_eq!((registers.mode, registers.msrs), (8, msrs.to_vec()));
        // A newer host may tell more.
        let longer = [&reply(0, &[])[..], &[1; 16]].concat();
        assert_eq!(Registers::decode(&longer, &[]).unwrap().msrs, []);
    }

    #[test]
    fn other_msrs_than_asked_for_are_an_error() {
        for (nmsrs, msrs) in [
            (0, &[][..]),
            (1, &[(1, 0)]),
            (u32::MAX, &[(1, 0), (2, 0)]),
            (2, &[(1, 0), (3, 0)]),
            (2, &[(2, 0), (1, 0)]),
        ] {
            let error = Registers::decode(&reply(nmsrs, msrs), &[1, 2]).unwrap_err();
            assert_eq!(error, ProtocolError::WrongMsrs, "{nmsrs} {msrs:?}");
        }
    }

    #[test]
    fn cut_reply_is_an_error() {
        let data = reply(1, &[(1, 0)]);
        assert_eq!(data.len(), 488);
        for got in [0, 8, 471, 472, 487] {
            let error = Registers::decode(&data[..got], &[1]).unwrap_err();
            assert_eq!(error, ProtocolError::Size { got, wanted: 488 });
        }
    }
}
