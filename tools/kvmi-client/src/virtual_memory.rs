// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Guest memory by virtual addresses.

use std::os::fd::AsFd;

use crate::{
    connection::Connection,
    error::{Error, Result},
    memory::pages,
};

impl<S: AsFd> Connection<S> {
    /// Reads guest memory at a virtual address of a vCPU, page by page. On an error `buffer` holds
    /// what came before; for a page that is not mapped it is [`Error::Unmapped`].
    ///
    /// While the vCPU runs the guest may map its memory differently from page to page: pause it for
    /// more than one, unless it is memory that all of the guest's processes share.
    pub fn read_virtual(&mut self, vcpu: u16, gva: u64, buffer: &mut [u8]) -> Result<()> {
        let mut left = buffer;
        for piece in pages(gva, left.len() as u64)? {
            let gpa = self.mapped(vcpu, piece.gpa)?;
            let (now, later) = left.split_at_mut(piece.len);
            self.read_physical(gpa, now)?;
            left = later;
        }
        Ok(())
    }

    /// Writes guest memory at a virtual address of a vCPU, page by page, whether or not the guest
    /// itself might; on an error the pages before are written. As for [`Self::read_virtual`].
    pub fn write_virtual(&mut self, vcpu: u16, gva: u64, data: &[u8]) -> Result<()> {
        let mut left = data;
        for piece in pages(gva, left.len() as u64)? {
            let gpa = self.mapped(vcpu, piece.gpa)?;
            let (now, later) = left.split_at(piece.len);
            self.write_physical(gpa, now)?;
            left = later;
        }
        Ok(())
    }

    fn mapped(&mut self, vcpu: u16, gva: u64) -> Result<u64> {
        self.translate_gva(vcpu, gva)?.ok_or(Error::Unmapped(gva))
    }
}
