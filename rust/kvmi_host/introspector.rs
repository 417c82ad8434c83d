// SPDX-License-Identifier: GPL-2.0

//! A VM whose guest may map pages of VMs that are introspected.
//!
//! The administrator makes a VM an introspector. Its guest, in kernel mode, presents a token that
//! a tool has got from a session: only who is told may map, and only the session's VM. An
//! introspector is not introspected itself.

use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    }, //
};
use kvmi_abi::{
    access::{
        is_page_aligned,
        PAGE_SIZE, //
    },
    hypercall::{
        Hypercall,
        MapEntry,
        EALREADY,
        MAX_MAP,
        MAX_UNMAP, //
    },
    token::MapToken,
    vcpu::GPA_UNMAPPED,
    Command,
    KvmiError, //
};
use zerocopy::{
    FromZeros,
    IntoBytes, //
};

use crate::{
    kvm::{
        AttachedVm,
        Attachment,
        CurrentVcpu,
        MapError,
        PageMap,
        Vm,
        VmId, //
    },
    registry,
    role::Role, //
};

/// What exists as long as the VM is an introspector. Fields are dropped in the order of their
/// declaration.
struct Attached {
    _attachment: Attachment<Role>,
    _entry: registry::Entry,
}

/// A VM that is an introspector, or was.
#[pin_data]
pub(crate) struct Introspector {
    vm_id: VmId,
    #[pin]
    vm: AttachedVm,
    #[pin]
    attached: Mutex<Option<Attached>>,
}

impl Introspector {
    /// Makes `vm` an introspector until [`Self::dismiss`].
    ///
    /// Fails with `EEXIST` if it is one or is introspected, `EOPNOTSUPP` if it cannot be.
    pub(crate) fn appoint(vm: &Vm) -> Result {
        let introspector = Arc::pin_init(
            pin_init!(Self {
                vm_id: vm.id(),
                vm <- AttachedVm::new(),
                attached <- new_mutex!(None, "Introspector::attached"),
            }),
            GFP_KERNEL,
        )?;
        // Whoever finds it in the registry waits until it is one or not.
        let mut attached = introspector.attached.lock();
        let role = Role::Introspector(introspector.clone());
        let entry = registry::Entry::new(role.clone())?;
        let attachment = Attachment::new(vm, Arc::new(role, GFP_KERNEL)?)?;
        *attached = Some(Attached {
            _attachment: attachment,
            _entry: entry,
        });
        Ok(())
    }

    /// Ends that: the guest sees its own pages again. Does nothing if it is none any more.
    pub(crate) fn dismiss(&self) {
        let mut attached = self.attached.lock();
        drop(attached.take());
    }

    /// Whether it is an introspector.
    pub(crate) fn is_appointed(&self) -> bool {
        self.attached.lock().is_some()
    }

    pub(crate) fn vm_id(&self) -> VmId {
        self.vm_id
    }

    pub(crate) fn vm(&self) -> &AttachedVm {
        &self.vm
    }

    /// Serves a hypercall of the guest; returns the result for it, or nothing if it is not ours.
    /// Fails with `EINTR` if the guest has to repeat it.
    pub(crate) fn hypercall(
        &self,
        vcpu: &CurrentVcpu,
        nr: u64,
        args: &[u64; 4],
        cpl: u32,
    ) -> Result<Option<i64>> {
        let Some(call) = Hypercall::parse(nr, args, cpl) else {
            return Ok(None);
        };
        let served = match call {
            Ok(call) => self.serve(vcpu, &call),
            Err(error) => Err(error.into()),
        };
        match served {
            Ok(result) => Ok(Some(result)),
            Err(MapError::Interrupted) => Err(EINTR),
            Err(MapError::Already) => Ok(Some(-i64::from(EALREADY))),
            Err(MapError::Kvmi(error)) => Ok(Some(-i64::from(error.code()))),
        }
    }

    fn serve(&self, vcpu: &CurrentVcpu, call: &Hypercall) -> Result<i64, MapError> {
        match *call {
            Hypercall::Map { token_gva, entry } => {
                self.map(vcpu, token_gva, &[PageMap::new(&entry)])
            }
            Hypercall::MapMany {
                token_gva,
                array_gpa,
                count,
            } => {
                let mut pages = KVec::with_capacity(count, GFP_KERNEL)?;
                for entry in self
                    .read_array::<MapEntry>(array_gpa, MAX_MAP)?
                    .iter()
                    .take(count)
                {
                    entry.check()?;
                    pages.push(PageMap::new(entry), GFP_KERNEL)?;
                }
                self.map(vcpu, token_gva, &pages)
            }
            Hypercall::Unmap { gpa } => match vcpu.unmap(&[gpa / PAGE_SIZE]) {
                1 => Ok(0),
                _ => Err(KvmiError::NoEnt.into()),
            },
            Hypercall::UnmapMany { array_gpa, count } => {
                let mut gfns = self.read_array::<u64>(array_gpa, MAX_UNMAP)?;
                gfns.truncate(count);
                unmap_many(vcpu, &mut gfns)
            }
        }
    }

    /// Maps all `pages` or none, if the token permits.
    fn map(&self, vcpu: &CurrentVcpu, token_gva: u64, pages: &[PageMap]) -> Result<i64, MapError> {
        let mut token = MapToken::default();
        self.read_virtual(vcpu, token_gva, &mut token.bytes)?;
        let found = registry::find_token(&token);
        token.wipe();
        let (session, in_use) = found.ok_or(KvmiError::NoEnt)?;
        vcpu.map(session.vm(), pages, in_use.writable, || {
            in_use.is_in_force() && session.policy().allows_command(Command::VmGetMapToken)
        })?;
        in_use.consume();
        Ok(0)
    }

    /// Reads memory of the guest at a virtual address, which may cross a page.
    fn read_virtual(&self, vcpu: &CurrentVcpu, gva: u64, buf: &mut [u8]) -> Result<(), MapError> {
        // Lossless: below a page's size.
        let in_page = (PAGE_SIZE - gva % PAGE_SIZE) as usize;
        let (first, second) = buf.split_at_mut(in_page.min(buf.len()));
        let read = |gva, buf: &mut [u8]| match vcpu.gva_to_gpa(gva) {
            _ if buf.is_empty() => Ok(()),
            GPA_UNMAPPED => Err(KvmiError::NoEnt),
            gpa => self.vm.read(gpa, buf),
        };
        read(gva, first)?;
        read(gva.wrapping_add(in_page as u64), second)?;
        Ok(())
    }

    /// Reads the page with an array.
    fn read_array<T>(&self, gpa: u64, len: usize) -> Result<KVec<T>, MapError>
    where
        T: FromZeros + IntoBytes + zerocopy::FromBytes + Clone,
    {
        let mut array = KVec::from_elem(T::new_zeroed(), len, GFP_KERNEL)?;
        self.vm.read(gpa, array.as_mut_slice().as_mut_bytes())?;
        Ok(array)
    }
}

/// Unmaps pages, whose addresses become frame numbers; returns how many from the first one on.
fn unmap_many(vcpu: &CurrentVcpu, gpas: &mut [u64]) -> Result<i64, MapError> {
    // What comes behind a wrong address is not unmapped any more.
    let aligned = gpas.iter().take_while(|gpa| is_page_aligned(**gpa)).count();
    let gfns = gpas.get_mut(..aligned).unwrap_or_default();
    gfns.iter_mut().for_each(|gpa| *gpa /= PAGE_SIZE);
    match vcpu.unmap(gfns) {
        0 if aligned == 0 => Err(KvmiError::Inval.into()),
        0 => Err(KvmiError::NoEnt.into()),
        // Lossless: at most 512.
        count => Ok(count as i64),
    }
}
