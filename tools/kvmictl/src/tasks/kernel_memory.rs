// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Memory of the guest's kernel by virtual addresses.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
};

use anyhow::Result;
use kvmi_client::{
    mapped::{MapError, Mapping},
    pages, Connection, Error, KvmiError, PAGE_SIZE,
};

use crate::memory::Via;

/// Something that can be read by virtual addresses.
pub trait Memory {
    /// Fills `buffer` with what is at `gva`.
    fn read(&mut self, gva: u64, buffer: &mut [u8]) -> Result<()>;

    /// Reads a 64-bit number.
    fn number(&mut self, gva: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.read(gva, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// The memory of a live kernel, whose mapping is the same in all processes and does not change. Pages
/// that can be mapped stay so, as long as there is room.
pub struct KernelMemory<'a, S: AsFd = OwnedFd> {
    vm: &'a mut Connection<S>,
    via: &'a Via,
    vcpus: Vec<u16>,
    /// By their virtual addresses.
    gpas: HashMap<u64, u64>,
    /// By their physical addresses.
    mapped: HashMap<u64, Mapping<'a>>,
}

impl<'a, S: AsFd> KernelMemory<'a, S> {
    /// The memory that any of `vcpus` has mapped.
    pub fn new(vm: &'a mut Connection<S>, via: &'a Via, vcpus: Vec<u16>) -> Self {
        Self {
            vm,
            via,
            vcpus,
            gpas: HashMap::new(),
            mapped: HashMap::new(),
        }
    }

    /// The physical address of a page.
    fn translate(&mut self, page: u64) -> Result<u64> {
        if let Some(gpa) = self.gpas.get(&page) {
            return Ok(*gpa);
        }
        // In user mode a vCPU may have isolated page tables, without most of the kernel.
        for vcpu in &self.vcpus {
            match self.vm.translate_gva(*vcpu, page) {
                Ok(Some(gpa)) => {
                    self.gpas.insert(page, gpa);
                    return Ok(gpa);
                }
                Ok(None) | Err(Error::Kvmi(KvmiError::Again, _)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Unmapped(page).into())
    }

    fn read_page(&mut self, gpa: u64, buffer: &mut [u8]) -> Result<()> {
        let Via::Mapping(window) = self.via else {
            return Ok(self.vm.read_physical(gpa, buffer)?);
        };
        let page = gpa - gpa % PAGE_SIZE;
        if !self.mapped.contains_key(&page) {
            let mapping = match window.map(self.vm, page, 1) {
                Err(MapError::Full(_)) => {
                    self.mapped.clear();
                    window.map(self.vm, page, 1)
                }
                other => other,
            };
            self.mapped.insert(page, mapping?);
        }
        match self.mapped.get(&page) {
            Some(mapping) => Ok(mapping.read(gpa, buffer)?),
            None => Err(MapError::Range.into()),
        }
    }
}

impl<S: AsFd> Memory for KernelMemory<'_, S> {
    fn read(&mut self, gva: u64, buffer: &mut [u8]) -> Result<()> {
        let mut left = buffer;
        for piece in pages(gva, left.len() as u64)? {
            let (now, later) = left.split_at_mut(piece.len);
            let offset = piece.gpa % PAGE_SIZE;
            let page = self.translate(piece.gpa - offset)?;
            self.read_page(page + offset, now)?;
            left = later;
        }
        Ok(())
    }
}
