// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Memory that guests use while tests look at it.

use std::{
    fs,
    os::unix::fs::FileExt as _,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU8, Ordering},
};

use rustix::mm::{madvise, mmap_anonymous, mprotect, Advice, MapFlags, MprotectFlags, ProtFlags};

/// Memory that a VM can use; it is there until the process ends.
#[derive(Clone, Copy)]
pub struct Memory {
    start: NonNull<u8>,
    /// Its size in bytes.
    pub len: usize,
}

// SAFETY: the memory is never unmapped, and all accesses are atomic.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory full of zeros, not touched yet.
    pub fn new(len: usize) -> Self {
        Self::map(0, len, MapFlags::PRIVATE)
    }

    /// Memory full of zeros, of which little will be touched: it may exceed that of the host.
    pub fn sparse(len: usize) -> Self {
        Self::map(0, len, MapFlags::PRIVATE | MapFlags::NORESERVE)
    }

    /// Memory full of zeros at this address of the process.
    pub fn at(address: usize, len: usize) -> Self {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        let memory = Self::map(address, len, flags);
        assert_eq!(memory.address(), address);
        memory
    }

    fn map(address: usize, len: usize, flags: MapFlags) -> Self {
        Self::try_map(address, len, flags).expect("memory can be mapped")
    }

    fn try_map(address: usize, len: usize, flags: MapFlags) -> Option<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let address = std::ptr::without_provenance_mut(address);
        // SAFETY: a new mapping that replaces none.
        let start = unsafe { mmap_anonymous(address, len, access, flags) }.ok()?;
        let start = NonNull::new(start.cast())?;
        Some(Self { start, len })
    }

    /// Memory of huge pages, if the kernel has some: `len` is a multiple of 2 MiB.
    pub fn huge(len: usize) -> Self {
        const ALIGN: usize = 2 << 20;
        let all = Self::new(len + ALIGN);
        let skip = all.address().next_multiple_of(ALIGN) - all.address();
        // SAFETY: the mapping is longer than `skip`.
        let start = unsafe { all.start.add(skip) };
        let memory = Self { start, len };
        memory.advise(libc::MADV_HUGEPAGE);
        memory
    }

    /// A page of 1 GiB, if the host has or can find one.
    pub fn giant() -> Option<Self> {
        const LEN: usize = 1 << 30;
        const NUMBER: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
        fs::write(NUMBER, "1").ok()?;
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_1GB;
        Self::try_map(0, LEN, flags)
    }

    /// Allows the kernel to merge its pages with others of the same content.
    pub fn mergeable(&self) {
        assert!(self.advise(libc::MADV_MERGEABLE), "KSM is there");
    }

    /// Makes huge pages of small ones, now; returns whether that worked.
    pub fn collapse(&self) -> bool {
        self.advise(libc::MADV_COLLAPSE)
    }

    /// Makes small pages of huge ones.
    pub fn split_up(&self) {
        let page = 4096;
        // One of the small ones is to be told apart.
        let inner = Self { len: page, ..*self };
        inner.advise(libc::MADV_NOHUGEPAGE);
        inner.advise(libc::MADV_HUGEPAGE);
    }

    /// Has the kernel swap its pages out, as far as it likes to.
    pub fn swap_out(&self) {
        self.advise(libc::MADV_PAGEOUT);
    }

    /// Whether the page at `offset` is swapped out.
    pub fn is_swapped_out(&self, offset: u64) -> bool {
        // Documentation/admin-guide/mm/pagemap.rst: 8 bytes for each page.
        const SWAPPED: u64 = 1 << 62;
        let page = (self.address() as u64 + offset) / 4096;
        let mut entry = [0; 8];
        let pages = fs::File::open("/proc/self/pagemap").expect("procfs is there");
        let read = pages.read_exact_at(&mut entry, page * 8);
        read.expect("the kernel tells about every page");
        u64::from_le_bytes(entry) & SWAPPED != 0
    }

    fn advise(&self, advice: i32) -> bool {
        // SAFETY: the range is the mapping; no advice given here changes its content.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, advice) == 0 }
    }

    /// Where it is in the process.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// Its bytes from `offset` on, one by one.
    fn bytes(&self, offset: u64, len: usize) -> &[AtomicU8] {
        let offset = usize::try_from(offset).expect("an offset");
        assert!(offset <= self.len && len <= self.len - offset);
        // SAFETY: the range is inside the mapping, which lasts for ever; the guest and the kernel
        // change it, hence the atomic type.
        unsafe { std::slice::from_raw_parts(self.start.add(offset).as_ptr().cast(), len) }
    }

    /// Takes whole pages away, in place of which there will be ones full of zeros.
    pub fn discard(&self, offset: usize, len: usize) {
        assert!(offset <= self.len && len <= self.len - offset);
        // SAFETY: the range is inside the mapping.
        let start = unsafe { self.start.add(offset) };
        // SAFETY: as in `bytes`: all accesses are atomic, and other values nothing new to them.
        let taken = unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxDontNeed) };
        taken.expect("memory can be taken away");
    }

    /// Has KVM unmap all pages, which stay what they are: guests fault once on each. Nobody may
    /// write to them meanwhile.
    pub fn withdraw(&self) {
        for access in [
            MprotectFlags::READ,
            MprotectFlags::READ | MprotectFlags::WRITE,
        ] {
            // SAFETY: the mapping is ours, and in the end what it has been.
            let set = unsafe { mprotect(self.start.as_ptr().cast(), self.len, access) };
            set.expect("memory can be protected");
        }
    }

    /// Takes the right to write to it, or gives it back. Nobody may write to it meanwhile.
    pub fn allow_writes(&self, allow: bool) {
        let mut access = MprotectFlags::READ;
        access.set(MprotectFlags::WRITE, allow);
        // SAFETY: the mapping is ours; whoever writes to it all the same gets a signal.
        let set = unsafe { mprotect(self.start.as_ptr().cast(), self.len, access) };
        set.expect("memory can be protected");
    }

    /// Copies bytes out.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let bytes = self.bytes(offset, len).iter();
        bytes.map(|byte| byte.load(Ordering::Relaxed)).collect()
    }

    /// Copies bytes in.
    pub fn write(&self, offset: u64, data: &[u8]) {
        for (to, from) in self.bytes(offset, data.len()).iter().zip(data) {
            to.store(*from, Ordering::Relaxed);
        }
    }

    /// Fills a range with one value.
    pub fn fill(&self, offset: u64, len: usize, value: u8) {
        for byte in self.bytes(offset, len) {
            byte.store(value, Ordering::Relaxed);
        }
    }

    /// The number at a multiple of four.
    pub fn number(&self, offset: u64) -> &AtomicU32 {
        assert_eq!(offset % 4, 0);
        // SAFETY: the range is inside the mapping and aligned, see `bytes`.
        unsafe { AtomicU32::from_ptr(self.bytes(offset, 4).as_ptr().cast_mut().cast()) }
    }
}

/// Bytes that the kernel has in nodes of XArrays, which are radix trees, if it tells. Those that a
/// CPU keeps in reserve are included.
pub fn tree_bytes() -> Option<u64> {
    let caches = fs::read_to_string("/proc/slabinfo").ok()?;
    let mut lines = caches.lines();
    let nodes = lines.find_map(|line| line.strip_prefix("radix_tree_node "))?;
    let mut numbers = nodes.split_whitespace();
    let active: u64 = numbers.next()?.parse().ok()?;
    let size: u64 = numbers.nth(1)?.parse().ok()?;
    Some(active * size)
}
