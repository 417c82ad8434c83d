// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What VMM and tool tell each other on the socket before the VM is hooked.
//!
//! Both structures begin with their size, and a receiver takes what it knows: the VMM's has been
//! 96 and 104 bytes long.

use zerocopy::IntoBytes as _;
use zerocopy_derive::{
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout, //
};

/// Largest structure that is accepted from the other side, in bytes.
pub const MAX_SIZE: u32 = 64 * 1024;

/// The VMM's part without its last field, as older VMMs send it.
const VMM_HELLO_SHORT: usize = 96;

/// Bytes of a VMM's part that no receiver can do without: all up to the name.
const VMM_HELLO_MIN: usize = 32;

/// Sent by the VMM (`kvmi_vmm_hello`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VmmHello {
    /// Number of bytes sent, this field included.
    pub struct_size: u32,
    /// UUID of the VM.
    pub uuid: [u8; 16],
    /// 0.
    pub padding: u32,
    /// When the VM was started, in seconds since 1970.
    pub start_time: i64,
    /// Name of the VM, padded with NULs; at least the last byte is one.
    pub name: [u8; 64],
    /// First guest physical address past the highest memory slot; 0 if not told.
    pub max_gpa: u64,
}

impl VmmHello {
    /// Number of bytes of the whole structure.
    pub const SIZE: usize = size_of::<Self>();

    /// Builds the structure; a name of more than 63 bytes is cut.
    pub fn new(uuid: [u8; 16], start_time: i64, name: &[u8], max_gpa: u64) -> Self {
        const SIZE: u32 = 104;
        const _: () = assert!(VmmHello::SIZE == SIZE as usize);
        let mut field = [0; 64];
        for (to, from) in field[..63].iter_mut().zip(name) {
            *to = *from;
        }
        Self {
            struct_size: SIZE,
            uuid,
            padding: 0,
            start_time,
            name: field,
            max_gpa,
        }
    }

    /// Says how many of the `struct_size` bytes that a VMM announces are to be kept (the first
    /// ones), or `None` if it announces nonsense.
    pub fn kept_len(struct_size: u32) -> Option<usize> {
        if struct_size > MAX_SIZE {
            return None;
        }
        let size = usize::try_from(struct_size).ok()?;
        (size >= VMM_HELLO_MIN).then_some(size.min(Self::SIZE))
    }

    /// Makes sense of the bytes kept: what was not sent is zero, the name ends in a NUL.
    pub fn from_prefix(bytes: &[u8]) -> Self {
        let mut hello = Self::new([0; 16], 0, b"", 0);
        let whole = hello.as_mut_bytes();
        // A partial last field is as good as none.
        let usable = match bytes.len() {
            n if n >= Self::SIZE => Self::SIZE,
            n => n.min(VMM_HELLO_SHORT),
        };
        for (to, from) in whole.iter_mut().zip(&bytes[..usable]) {
            *to = *from;
        }
        hello.name[63] = 0;
        hello
    }

    /// The name without its padding.
    pub fn name(&self) -> &[u8] {
        self.name.split(|b| *b == 0).next().unwrap_or_default()
    }
}

/// Sent by the tool in answer (`kvmi_tool_hello`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ToolHello {
    /// Number of bytes sent, this field included.
    pub struct_size: u32,
    /// SHA-1 of the secret that VMM and tool share, or anything if they share none.
    pub cookie_hash: [u8; 20],
}

impl ToolHello {
    /// Number of bytes of the structure.
    pub const SIZE: usize = size_of::<Self>();

    /// Builds the structure.
    pub fn new(cookie_hash: [u8; 20]) -> Self {
        const SIZE: u32 = 24;
        const _: () = assert!(ToolHello::SIZE == SIZE as usize);
        Self {
            struct_size: SIZE,
            cookie_hash,
        }
    }

    /// Whether a tool may announce a structure of `struct_size` bytes; what goes beyond
    /// [`Self::SIZE`] is to be read and dropped.
    pub fn accepts(struct_size: u32) -> bool {
        struct_size <= MAX_SIZE && usize::try_from(struct_size).is_ok_and(|size| size >= Self::SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vmm_structure_of_every_known_size_is_understood() {
        let full = VmmHello::new([7; 16], 1234, b"guest", 0x1_0000_0000);
        assert_eq!(VmmHello::kept_len(104), Some(104));
        assert_eq!(VmmHello::from_prefix(full.as_bytes()), full);

        assert_eq!(VmmHello::kept_len(96), Some(96));
        let short = VmmHello::from_prefix(&full.as_bytes()[..96]);
        assert_eq!(short.max_gpa, 0);
        assert_eq!(short.name(), b"guest");

        assert_eq!(VmmHello::kept_len(4096), Some(104));
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert_eq!(VmmHello::kept_len(0), None);
        assert_eq!(VmmHello::kept_len(31), None);
        assert_eq!(VmmHello::kept_len(MAX_SIZE + 1), None);
        assert!(!ToolHello::accepts(23));
        assert!(ToolHello::accepts(24));
        assert!(!ToolHello::accepts(u32::MAX));
    }

    #[test]
    fn name_always_ends() {
        let mut hello = VmmHello::new([0; 16], 0, &[b'x'; 200], 0);
        assert_eq!(hello.name().len(), 63);
        hello.name = [b'y'; 64];
        assert_eq!(VmmHello::from_prefix(hello.as_bytes()).name().len(), 63);
    }

    #[test]
    fn partial_max_gpa_is_not_believed() {
        let full = VmmHello::new([7; 16], 0, b"", u64::MAX);
        assert_eq!(VmmHello::from_prefix(&full.as_bytes()[..100]).max_gpa, 0);
    }
}
