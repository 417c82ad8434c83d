// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Lookups in a table of a kernel at 0x81000000, without KASLR.

use super::*;

const BASE: u64 = 0xffff_ffff_8100_0000;
const IMAGE: Range<u64> = BASE..BASE + 0x1000;
const MODULE: u64 = 0xffff_ffff_c020_0000;

/// Not in the order of the addresses, and one of them twice.
const SYMBOLS: [(u64, u8, &str, Option<&str>); 21] = [
    (BASE + 0x200, b't', "twice", None),
    (BASE + 0x100, b'T', "schedule", None),
    (BASE, b'T', "_stext", None),
    (BASE, b'T', "startup_64", None),
    (BASE, b'T', "_text", None),
    (BASE + 0x100, b'T', "schedule", None),
    (BASE + 0x100, b'T', "__sched_text_start", None),
    (BASE + 0x100, b'W', "arch_schedule", None),
    (BASE + 0x300, b't', "twice", None),
    (BASE + 0x340, b't', "once_global", None),
    (BASE + 0x380, b'T', "once_global", None),
    (BASE + 0x400, b'T', "_etext", None),
    (BASE + 0x800, b'D', "init_task", None),
    (BASE + 0x1000, b'B', "_end", None),
    (BASE + 0x2000, b'A', "beyond", None),
    (0x1000, b'A', "a_constant", None),
    (0, b'D', "cpu_number", None),
    (MODULE, b't', "schedule", Some("m")),
    (MODULE + 0x40, b't', "probe", Some("m")),
    (MODULE + 0x3000, b'd', "data", Some("m")),
    (MODULE + 0x3800, b't', "init", Some("n")),
];

fn table() -> Table {
    let mut builder = Builder::default();
    for (address, kind, name, module) in SYMBOLS {
        builder.add(address, kind, name, module).unwrap();
    }
    builder.finish()
}

fn place(table: &Table, address: u64) -> Option<String> {
    table
        .resolve(address, &IMAGE)
        .map(|place| place.to_string())
}

#[test]
fn duplicates_count_once() {
    assert_eq!(table().count(), SYMBOLS.len() - 1);
}

#[test]
fn addresses_have_the_name_that_tells_most() {
    let table = table();
    for (offset, expected) in [
        (0, "startup_64+0x0/0x100"),
        (0xff, "startup_64+0xff/0x100"),
        (0x100, "schedule+0x0/0x100"),
        (0x350, "once_global+0x10/0x40"),
        (0x801, "init_task+0x1/0x800"),
        (0xfff, "init_task+0x7ff/0x800"),
    ] {
        assert_eq!(place(&table, BASE + offset).as_deref(), Some(expected));
    }
}

#[test]
fn addresses_outside_the_kernel_have_no_name() {
    let table = table();
    for address in [
        0,
        0x1000,
        0x1001,
        BASE - 1,
        BASE + 0x1000,
        BASE + 0x2001,
        u64::MAX,
    ] {
        assert_eq!(place(&table, address), None, "{address:#x}");
    }
}

#[test]
fn modules_are_named_as_far_as_their_symbols_are_known_to_reach() {
    let table = table();
    for (offset, expected) in [
        (0x3f, Some("schedule+0x3f/0x40 [m]")),
        // Data follows, which may be anywhere.
        (0x40, Some("probe+0x0 [m]")),
        (0xfff, Some("probe+0xfbf [m]")),
        (0x1000, None),
        // Another module follows.
        (0x3001, Some("data+0x1 [m]")),
        (0x3fff, Some("init+0x7ff [n]")),
        (0x4000, None),
    ] {
        assert_eq!(
            place(&table, MODULE + offset).as_deref(),
            expected,
            "{offset:#x}"
        );
    }
}

fn extent(symbol: &str) -> Result<(u64, u64), LookupError> {
    let found = table().extent(symbol, &IMAGE, 0x20_0000)?;
    Ok((found.start, found.end - found.start))
}

#[test]
fn names_lead_to_addresses() {
    for (symbol, expected) in [
        ("_stext", (BASE, 0x100)),
        ("schedule", (BASE + 0x100, 0x100)),
        ("m:schedule", (MODULE, 0x40)),
        ("once_global", (BASE + 0x380, 0x80)),
        ("_end", (BASE + 0x1000, 0)),
        ("probe", (MODULE + 0x40, 0)),
    ] {
        assert_eq!(extent(symbol), Ok(expected), "{symbol}");
    }
}

#[test]
fn names_that_do_not_lead_to_one_address_are_errors() {
    let unknown = |name: &str| Err(LookupError::Unknown(name.to_owned()));
    for name in [
        "",
        "schedul",
        "schedule_",
        "n:schedule",
        "x:y:z",
        ":",
        "zzz",
    ] {
        assert_eq!(extent(name), unknown(name));
    }
    for name in ["a_constant", "cpu_number", "beyond"] {
        assert_eq!(
            extent(name),
            Err(LookupError::NotAnAddress(name.to_owned()))
        );
    }
    // With the addresses that the guest has.
    let twice = LookupError::Ambiguous {
        symbol: "twice".to_owned(),
        addresses: vec![BASE + 0x20_0200, BASE + 0x20_0300],
    };
    assert_eq!(extent("twice"), Err(twice.clone()));
    let text = twice.to_string();
    assert!(
        text.contains("2 symbols") && text.contains("0xffffffff81200300"),
        "{text}"
    );
}

#[test]
fn modules_can_be_forgotten() {
    let mut table = table();
    table.drop_modules();
    assert_eq!(place(&table, MODULE), None);
    assert!(table.extent("probe", &IMAGE, 0).is_err());
    assert_eq!(table.kernel_symbol("schedule"), Some(BASE + 0x100));
    assert_eq!(table.count(), SYMBOLS.len() - 5);
}

#[test]
fn symbols_of_the_kernel_can_be_confirmed() {
    let table = table();
    assert_eq!(table.kernel_symbol("twice"), None);
    assert_eq!(table.kernel_symbol("probe"), None);
    assert_eq!(table.has("twice", BASE + 0x300), Some(true));
    assert_eq!(table.has("twice", BASE + 0x301), Some(false));
    assert_eq!(table.has("probe", MODULE + 0x40), None);
}

#[test]
fn tables_are_thrifty() {
    assert_eq!(size_of::<Entry>(), 16);
    let table = table();
    let names: usize = SYMBOLS.iter().map(|(_, _, name, _)| name.len() + 1).sum();
    assert_eq!(table.names.len(), names);
    assert_eq!(table.by_address.capacity(), table.count());
}
