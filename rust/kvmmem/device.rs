// SPDX-License-Identifier: GPL-2.0

//! `/dev/kvmmem`: who calls, and with what arguments.

use kernel::{
    fs::File,
    miscdevice::{
        MiscDevice,
        MiscDeviceRegistration, //
    },
    mm::virt::VmaNew,
    prelude::*,
    sync::{
        Arc,
        ArcBorrow, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};
use kvmi_abi::{
    mem::{
        MemIoctl,
        MemMap,
        MemMapMany,
        MemUnmapMany, //
    },
    mem_range::{
        page_address,
        PageRange, //
    }, //
};
use zerocopy::{
    FromZeros,
    IntoBytes, //
};

use crate::{
    errno::of_range,
    file_map::FileMap,
    secret::Secret, //
};

#[vtable]
impl MiscDevice for FileMap {
    type Ptr = Arc<Self>;

    fn open(_file: &File, _misc: &MiscDeviceRegistration<Self>) -> Result<Arc<Self>> {
        Self::new()
    }

    fn release(me: Arc<Self>, _file: &File) {
        me.close();
    }

    fn mmap(me: ArcBorrow<'_, Self>, _file: &File, vma: &VmaNew) -> Result {
        me.expect_owner()?;
        Arc::from(me).add_area(vma)
    }

    fn ioctl(me: ArcBorrow<'_, Self>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        me.serve(MemIoctl::native(cmd, arg))
    }

    #[cfg(CONFIG_COMPAT)]
    fn compat_ioctl(me: ArcBorrow<'_, Self>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        me.serve(MemIoctl::compat(cmd, arg))
    }
}

impl FileMap {
    fn serve(&self, request: Option<MemIoctl>) -> Result<isize> {
        let request = request.ok_or(ENOTTY)?;
        self.expect_owner()?;
        match request {
            MemIoctl::Map(arg) => self.serve_map(arg),
            MemIoctl::Unmap(gva) => {
                self.unmap(&PageRange::page(gva).map_err(of_range)?)?;
                Ok(0)
            }
            MemIoctl::MapMany(arg) => self.serve_map_many(arg),
            MemIoctl::UnmapMany(arg) => self.serve_unmap_many(arg),
        }
    }

    fn serve_map(&self, arg: usize) -> Result<isize> {
        let request = Secret::<MemMap>::from_user(arg)?;
        let range = PageRange::page(request.gva).map_err(of_range)?;
        let target = page_address(request.gpa).map_err(of_range)?;
        self.map(&range, request.token(), target)?;
        Ok(0)
    }

    fn serve_map_many(&self, arg: usize) -> Result<isize> {
        let request = Secret::<MemMapMany>::from_user(arg)?;
        let range =
            PageRange::to_map(request.gva, request.count, request.padding).map_err(of_range)?;
        let targets = read_targets(usize::try_from(request.gpas)?, range.pages())?;
        self.map_many(&range, request.token(), &targets)?;
        Ok(0)
    }

    fn serve_unmap_many(&self, arg: usize) -> Result<isize> {
        let mut request = MemUnmapMany::new_zeroed();
        UserSlice::new(UserPtr::from_addr(arg), size_of::<MemUnmapMany>())
            .reader()
            .read_slice(request.as_mut_bytes())?;
        let range = PageRange::to_unmap(&request).map_err(of_range)?;
        Ok(isize::try_from(self.unmap_many(&range)?)?)
    }
}

/// Copies `count` guest physical addresses from user space; fails with `EINVAL` if one is not page
/// aligned.
fn read_targets(address: usize, count: u32) -> Result<KVec<u64>> {
    let count = usize::try_from(count)?;
    let mut targets = KVec::from_elem(0, count, GFP_KERNEL)?;
    UserSlice::new(UserPtr::from_addr(address), count * size_of::<u64>())
        .reader()
        .read_slice(targets.as_mut_slice().as_mut_bytes())?;
    for &target in &targets {
        page_address(target).map_err(of_range)?;
    }
    Ok(targets)
}
