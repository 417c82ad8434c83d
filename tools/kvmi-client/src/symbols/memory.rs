// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Reading what a guest's kernel has in its memory, be it mapped or not.

use std::{collections::HashMap, os::fd::AsFd};

use kvmi_abi::KvmiError;

use crate::{
    connection::Connection,
    error::{Error, Result},
    memory::PAGE_SIZE,
};

/// Bytes that a symbol's name may have.
const MAX_NAME: usize = 512;

/// Memory of the guest, each page of which is read once.
pub(super) struct Memory<'a, S: AsFd> {
    vm: &'a mut Connection<S>,
    vcpu: u16,
    pages: HashMap<u64, Option<Vec<u8>>>,
}

impl<'a, S: AsFd> Memory<'a, S> {
    /// What a vCPU has mapped.
    pub(super) fn new(vm: &'a mut Connection<S>, vcpu: u16) -> Self {
        Self {
            vm,
            vcpu,
            pages: HashMap::new(),
        }
    }

    /// The bytes from an address to the end of its page, if it is mapped to memory.
    fn rest_of_page(&mut self, gva: u64) -> Result<Option<&[u8]>> {
        let start = gva - gva % PAGE_SIZE;
        if !self.pages.contains_key(&start) {
            let mut page = vec![0; usize::try_from(PAGE_SIZE).unwrap_or(0)];
            let page = match self.vm.read_virtual(self.vcpu, start, &mut page) {
                Ok(()) => Some(page),
                Err(Error::Unmapped(_) | Error::Kvmi(KvmiError::NoEnt | KvmiError::Again, _)) => {
                    None
                }
                Err(error) => return Err(error),
            };
            self.pages.insert(start, page);
        }
        let page = self.pages.get(&start).and_then(Option::as_deref);
        let at = usize::try_from(gva - start).unwrap_or(0);
        Ok(page.and_then(|page| page.get(at..)))
    }

    /// Some bytes, if they are mapped to memory.
    pub(super) fn bytes(&mut self, gva: u64, len: usize) -> Result<Option<Vec<u8>>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let Some(next) = gva.checked_add(bytes.len() as u64) else {
                return Ok(None);
            };
            let left = len - bytes.len();
            match self.rest_of_page(next)? {
                Some(page) => bytes.extend(page.iter().take(left)),
                None => return Ok(None),
            }
        }
        Ok(Some(bytes))
    }

    /// The name of a symbol, if there is one.
    pub(super) fn name(&mut self, gva: u64) -> Result<Option<String>> {
        let mut name = Vec::new();
        while name.len() < MAX_NAME {
            let Some(next) = gva.checked_add(name.len() as u64) else {
                return Ok(None);
            };
            let Some(page) = self.rest_of_page(next)? else {
                return Ok(None);
            };
            let end = page.iter().position(|byte| *byte == 0);
            name.extend(&page[..end.unwrap_or(page.len())]);
            if end.is_some() {
                let name = String::from_utf8(name).ok();
                return Ok(name.filter(|name| !name.is_empty()));
            }
        }
        Ok(None)
    }

    /// Where a 64-bit gate leads to, if there is one.
    pub(super) fn gate(&mut self, gva: u64) -> Result<Option<u64>> {
        let gate = self.bytes(gva, 16)?;
        Ok(gate.and_then(|gate| {
            let gate = u128::from_le_bytes(gate.try_into().ok()?);
            let low = gate & 0xffff | gate >> 32 & 0xffff_0000;
            u64::try_from(low | gate >> 32 & 0xffff_ffff_0000_0000).ok()
        }))
    }
}
