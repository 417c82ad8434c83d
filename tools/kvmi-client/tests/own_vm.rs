// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Finding VMs, and taking their file descriptors, where the test itself is the VMM.
//!
//! Does nothing where KVM cannot be used.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use kvmi_client::{
    attach::{Attachment, Target},
    device::Device,
    discover::{self, Vmm},
    AttachError,
};
use rustix::ioctl::{ioctl, Ioctl, IoctlOutput, Opcode};

const CREATE_VM: Opcode = kvmi_client::abi::ioctl::io(0xAE, 0x01);
const CREATE_VCPU: Opcode = kvmi_client::abi::ioctl::io(0xAE, 0x41);

/// An ioctl of KVM that takes a number and gives a file descriptor.
struct Create<const OPCODE: Opcode>(usize);

// SAFETY: The argument is a number, and the result a new file descriptor.
unsafe impl<const OPCODE: Opcode> Ioctl for Create<OPCODE> {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<Self::Output> {
        // SAFETY: The caller passes what the ioctl has returned, which nobody else knows.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

fn create<const OPCODE: Opcode>(on: &impl std::os::fd::AsFd, argument: usize) -> OwnedFd {
    // SAFETY: `Create` describes the two ioctls that this is used for.
    unsafe { ioctl(on, Create::<OPCODE>(argument)) }.unwrap()
}

fn myself() -> Result<Vmm, AttachError> {
    discover::process(std::process::id().try_into().unwrap())
}

fn kvm() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm")
}

#[test]
fn own_vms_are_found_and_their_descriptors_taken() {
    let Ok(kvm) = kvm() else {
        eprintln!("skipped: KVM cannot be used");
        return;
    };
    assert!(matches!(myself(), Err(AttachError::NoVm(_))));

    let vm = create::<CREATE_VM>(&kvm, 0);
    let _vcpu = create::<CREATE_VCPU>(&vm, 0);
    let one = myself().unwrap();
    assert_eq!((&one.vm_fds[..], one.vcpus), (&[vm.as_raw_fd()][..], 1));
    assert!(discover::scan()
        .unwrap()
        .vmms
        .iter()
        .any(|v| v.pid == one.pid));

    let target = Target::new(&one, None).unwrap();
    assert_eq!(target.vm_fd(), vm.as_raw_fd());
    // The duplicate is closed again: a second one gets the same number.
    let number = target.duplicate_vm_fd().unwrap().as_raw_fd();
    assert_eq!(target.duplicate_vm_fd().unwrap().as_raw_fd(), number);

    let second = create::<CREATE_VM>(&kvm, 0);
    let two = myself().unwrap();
    let several = Target::new(&two, None);
    assert!(matches!(several, Err(AttachError::SeveralVms { fds, .. }) if fds.len() == 2));
    let chosen = Target::new(&two, Some(second.as_raw_fd())).unwrap();
    assert_eq!(chosen.vm_fd(), second.as_raw_fd());
    let wrong = Target::new(&two, Some(kvm.as_raw_fd()));
    assert!(matches!(wrong, Err(AttachError::NoVm(_))));

    other_process(&two);
    no_device(&chosen);
    gone(second, &chosen);
}

/// The pid is that of another process now.
fn other_process(vmm: &Vmm) {
    let mut other = vmm.clone();
    other.start_ticks += 1;
    let target = Target::new(&other, Some(other.vm_fds[0]));
    assert!(matches!(target, Err(AttachError::Gone)));
}

/// A device that does not know the ioctls.
fn no_device(target: &Target) {
    let null = || Device::from_file(File::open("/dev/null").unwrap());
    let status = target.status(&null()).unwrap_err();
    assert!(matches!(status, AttachError::System { .. }), "{status}");
    let attached = Attachment::connect_to(target, null()).unwrap_err();
    assert!(matches!(attached, AttachError::System { .. }), "{attached}");
}

/// The VM is closed, and then something else gets its number.
fn gone(vm: OwnedFd, target: &Target) {
    let number: RawFd = vm.as_raw_fd();
    drop(vm);
    assert!(matches!(target.duplicate_vm_fd(), Err(AttachError::Gone)));
    let files: Vec<File> = std::iter::repeat_with(|| File::open("/dev/null").unwrap())
        .take(64)
        .collect();
    assert!(files.iter().any(|file| file.as_raw_fd() == number));
    assert!(matches!(target.duplicate_vm_fd(), Err(AttachError::Gone)));
}
