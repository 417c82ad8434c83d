// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Mappings, without anything behind them.

use super::*;

fn window(pages: usize) -> Window {
    let file = tempfile::tempfile().unwrap();
    file.set_len(pages as u64 * PAGE_SIZE).unwrap();
    Window {
        area: Area::of_file(file, pages).unwrap(),
        slots: Mutex::new(Slots::new(pages)),
    }
}

/// Pages from 0x5000 on, as if they were mapped.
fn mapping(window: &Window, pages: usize, is_writable: bool) -> Mapping<'_> {
    Mapping {
        window,
        gpa: 0x5000,
        first: window.slots().take(pages).unwrap(),
        taken: pages,
        mapped: pages,
        is_writable,
    }
}

#[test]
fn ranges_become_whole_pages() {
    assert_eq!(pages_of(0x1fff, 2).unwrap(), [0x1000, 0x2000]);
    assert_eq!(pages_of(0x2000, 0x1000).unwrap(), [0x2000]);
    assert_eq!(pages_of(u64::MAX, 1).unwrap(), [u64::MAX - 0xfff]);
    assert!(matches!(pages_of(0, 0), Err(MapError::Range)));
    assert!(matches!(pages_of(u64::MAX, 2), Err(MapError::Range)));
}

#[test]
fn memory_is_at_the_addresses_of_the_vm() {
    let window = window(4);
    let other = window.slots().take(1);
    let mapping = mapping(&window, 2, true);
    assert_eq!((other, mapping.first), (Some(0), 1));
    assert_eq!(mapping.range(), 0x5000..0x7000);
    mapping.write_obj(0x5ffe, &0x1234_5678_u32).unwrap();
    assert_eq!(mapping.read_obj::<u32>(0x5ffe).unwrap(), 0x1234_5678);
    assert_eq!(mapping.read_obj::<u16>(0x6000).unwrap(), 0x1234);
    for gpa in [0x4fff, 0x6ffd, 0x7000, 0, u64::MAX] {
        let beyond = mapping.read_obj::<u32>(gpa);
        assert!(matches!(beyond, Err(MapError::Range)), "{gpa:#x}");
    }
}

#[test]
fn read_only_mapping_is_not_written_to() {
    let window = window(1);
    let mapping = mapping(&window, 1, false);
    let refused = mapping.write(0x5000, &[1]);
    assert!(matches!(refused, Err(MapError::ReadOnly)));
    assert_eq!(mapping.read_obj::<u8>(0x5000).unwrap(), 0);
}

#[test]
fn pages_that_cannot_be_unmapped_are_not_used_again() {
    let window = window(2);
    // A file that is not the device knows no such ioctl.
    let stuck = mapping(&window, 1, false);
    assert!(matches!(stuck.unmap(), Err(MapError::System { .. })));
    assert_eq!(window.slots().take(1), Some(1));
    assert_eq!(window.slots().take(1), None);
}

#[test]
fn pages_that_were_never_mapped_are_free_again() {
    let window = window(1);
    let mut nothing = mapping(&window, 1, false);
    nothing.mapped = 0;
    drop(nothing);
    assert_eq!(window.slots().take(1), Some(0));
}
