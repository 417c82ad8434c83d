// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Finding a kernel in a guest that has just so much of one as is looked at.

mod common;

use std::io::Read as _;

use common::{with_host, Host};
use kvmi_client::{
    abi::{
        vcpu::{GetRegistersReply, MsrEntry},
        wire::Header,
    },
    symbols::{Kernel, LocateError, Symbols},
    Command, Error, KvmiError,
};
use proptest::prelude::*;
use zerocopy::{FromBytes as _, IntoBytes as _};

/// Where the file has the kernel.
const BASE: u64 = 0xffff_ffff_8100_0000;
const KASLR: u64 = 0x1_2e00_0000 - 0x1_0000_0000;
const ENTRY: u64 = 0x80;
const FAULT: u64 = 0xc0;
const BANNER: u64 = 0x1100;
const EXPORTS: u64 = 0x1fd4;
const NAMES: u64 = 0x2ff8;
const SIZE: usize = 0x4000;
const IDT: u64 = 0xffff_fe00_0000_0000;

/// Exported symbols: their names, and where they are.
const EXPORTED: [(&str, u64); 9] = [
    ("a", 0x100),
    ("b", 0x200),
    ("c", 0x300),
    ("d", 0x400),
    ("e", 0x500),
    ("f", 0x600),
    ("g", 0x700),
    ("some_data", 0x1400),
    ("schedule", 0x140),
];

/// How a guest differs from one that has the kernel of the file where the file says.
#[derive(Clone)]
struct Guest {
    offset: u64,
    lstar: Option<u64>,
    fault: Option<u64>,
    banner: &'static [u8],
    exported: [(&'static str, u64); 9],
    /// Size of an entry of the table of exports.
    entry: u64,
    /// Whether a vCPU has the kernel mapped.
    mapped: fn(u16) -> bool,
}

impl Guest {
    fn new(offset: u64) -> Self {
        Self {
            offset,
            lstar: Some(BASE + offset + ENTRY),
            fault: Some(BASE + offset + FAULT),
            banner: b"Linux version 7.2.0-test (x) #1\n\0",
            exported: EXPORTED,
            entry: 12,
            mapped: |_| true,
        }
    }

    fn memory(&self) -> Vec<u8> {
        let mut memory = vec![0; SIZE];
        let mut put = |at: u64, bytes: &[u8]| {
            memory[at as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        put(BANNER, self.banner);
        let mut name_at = NAMES;
        for (nth, (name, at)) in (0..).zip(self.exported) {
            put(name_at, name.as_bytes());
            let entry = EXPORTS + nth * self.entry;
            if self.entry == 16 {
                put(entry, &(BASE + self.offset + at).to_le_bytes());
                put(entry + 8, &(BASE + self.offset + name_at).to_le_bytes());
            } else {
                put(entry, &(at.wrapping_sub(entry) as i32).to_le_bytes());
                put(entry + 4, &((name_at - entry - 4) as i32).to_le_bytes());
            }
            name_at += name.len() as u64 + 1;
        }
        memory
    }

    /// What `/proc/kallsyms`, or System.map for an offset of 0, says.
    fn map(&self, offset: u64) -> String {
        let mut map = String::new();
        let mut add = |at: u64, kind: char, name: &str| {
            map += &format!("{:016x} {kind} {name}\n", BASE + offset + at);
        };
        add(SIZE as u64, 'B', "_end");
        add(0, 'T', "_text");
        add(0, 'T', "_stext");
        add(ENTRY, 'T', "entry_SYSCALL_64");
        add(FAULT, 'T', "asm_exc_page_fault");
        add(BANNER, 'D', "linux_banner");
        add(EXPORTS, 'R', "__start___ksymtab");
        let end = EXPORTS + self.entry * EXPORTED.len() as u64;
        add(end, 'R', "__stop___ksymtab");
        for (name, at) in EXPORTED {
            add(at, 'T', name);
        }
        map + "ffffffffc0200000 t in_module\t[m]\n"
    }

    fn serve(&self, mut host: Host) {
        let memory = self.memory();
        let mut header = [0; 8];
        while host.0.read_exact(&mut header).is_ok() {
            let header = Header::read_from_bytes(&header).unwrap();
            let mut payload = vec![0; header.size.into()];
            host.0.read_exact(&mut payload).unwrap();
            let number = |at: usize| u64::from_ne_bytes(payload[at..at + 8].try_into().unwrap());
            match Command::from_id(header.id).unwrap() {
                // The last vCPU is not started.
                _ if header.id != Command::VmReadPhysical.id() && payload[0] == 2 => {
                    host.fail(&header, KvmiError::Again);
                }
                Command::VcpuGetRegisters => host.succeed(&header, &self.registers()),
                Command::VcpuTranslateGva => {
                    let gpa = self.translate(payload[0].into(), number(8));
                    host.succeed(&header, &gpa.unwrap_or(u64::MAX).to_ne_bytes());
                }
                Command::VmReadPhysical => {
                    let (at, len) = (number(0) as usize, number(8) as usize & 0xffff);
                    match memory.get(at..at + len) {
                        Some(bytes) => host.succeed(&header, bytes),
                        None if at >> 32 == 1 => {
                            let idt = self.idt();
                            host.succeed(&header, &idt);
                        }
                        None => host.fail(&header, KvmiError::NoEnt),
                    }
                }
                command => panic!("{command:?}"),
            }
        }
    }

    fn registers(&self) -> Vec<u8> {
        let mut reply = GetRegistersReply {
            mode: 8,
            nmsrs: 1,
            ..Default::default()
        };
        reply.sregs.efer = 0x500;
        reply.sregs.idt.base = IDT;
        let lstar = MsrEntry {
            index: 0xc000_0082,
            reserved: 0,
            data: self.lstar.unwrap_or(0),
        };
        [reply.as_bytes(), lstar.as_bytes()].concat()
    }

    fn translate(&self, vcpu: u16, gva: u64) -> Option<u64> {
        match gva & !0xfff {
            IDT => self.fault.map(|_| 1 << 32),
            _ if !(self.mapped)(vcpu) => None,
            _ => {
                let at = gva.checked_sub(BASE + self.offset)?;
                (at < SIZE as u64).then_some(at)
            }
        }
    }

    fn idt(&self) -> Vec<u8> {
        let mut idt = vec![0; 4096];
        let fault = self.fault.unwrap_or(0).to_le_bytes();
        let gate = &mut idt[14 * 16..];
        gate[..2].copy_from_slice(&fault[..2]);
        gate[2..6].copy_from_slice(&[0x10, 0, 0, 0x8e]);
        gate[6..12].copy_from_slice(&fault[2..]);
        idt
    }

    fn locate_by(&self, map: &str) -> Result<Kernel, LocateError> {
        let symbols = Symbols::parse(map.as_bytes()).unwrap();
        with_host(
            |host| self.serve(host),
            |mut vm| symbols.locate(&mut vm, &[2, 0, 1]),
        )
    }

    fn locate(&self) -> Result<Kernel, LocateError> {
        self.locate_by(&self.map(0))
    }
}

#[test]
fn kernel_is_found_wherever_it_is() {
    for offset in [0, 0x20_0000, KASLR, 0x3fe0_0000] {
        let kernel = Guest::new(offset).locate().unwrap();
        assert_eq!(kernel.offset(), offset);
        assert_eq!(kernel.banner(), "Linux version 7.2.0-test (x) #1");
        let at = BASE + offset + 0x142;
        let place = kernel.resolve(at).unwrap();
        assert_eq!(place.to_string(), "schedule+0x2/0xc0");
        assert_eq!(kernel.address("schedule"), Ok(at - 2));
        let text = BASE + offset..BASE + offset + ENTRY;
        assert_eq!(kernel.range("_stext", "entry_SYSCALL_64"), Ok(text.clone()));
        assert_eq!(kernel.extent("_text"), Ok(text));
        assert!(kernel.range("schedule", "_stext").is_err());
        assert_eq!(kernel.resolve(BASE + offset - 1), None);
        assert_eq!(kernel.resolve(BASE + offset + SIZE as u64), None);
    }
}

#[test]
fn one_way_into_the_kernel_is_enough() {
    let mut guest = Guest::new(KASLR);
    guest.lstar = None;
    assert_eq!(guest.locate().unwrap().offset(), KASLR);
    // Another one, which somebody else took over.
    guest.lstar = Some(0xffff_ffff_c012_3456);
    assert_eq!(guest.locate().unwrap().offset(), KASLR);
    guest.lstar = Some(BASE + KASLR + ENTRY + 0x20_0000);
    assert_eq!(guest.locate().unwrap().offset(), KASLR);
    let mut guest = Guest::new(KASLR);
    guest.fault = None;
    assert_eq!(guest.locate().unwrap().offset(), KASLR);
}

#[test]
fn dump_of_another_boot_serves_but_for_its_modules() {
    let guest = Guest::new(KASLR);
    let module = 0xffff_ffff_c020_0000;
    let same = guest.locate_by(&guest.map(KASLR)).unwrap();
    assert_eq!(same.resolve(module).unwrap().module, Some("m"));
    for made_at in [0, 0x3000_0000] {
        let other = guest.locate_by(&guest.map(made_at)).unwrap();
        assert_eq!(other.address("a"), Ok(BASE + KASLR + 0x100));
        assert_eq!(other.resolve(module), None);
        assert!(other.address("in_module").is_err());
    }
}

#[test]
fn tables_of_older_kernels_are_compared_too() {
    for entry in [8, 16] {
        let mut guest = Guest::new(KASLR);
        guest.entry = entry;
        guest.locate().unwrap();
        guest.exported[8].1 += 16;
        let error = guest.locate().unwrap_err();
        assert!(matches!(error, LocateError::OtherBuild { .. }), "{error}");
    }
}

#[test]
fn other_build_is_told_from_this_one_by_a_single_symbol() {
    for (nth, (name, at)) in EXPORTED.iter().enumerate() {
        let mut guest = Guest::new(KASLR);
        guest.exported[nth].1 += 4;
        let error = guest.locate().unwrap_err();
        let text = error.to_string();
        let LocateError::OtherBuild {
            banner,
            symbol,
            address,
        } = error
        else {
            panic!("{text}");
        };
        assert_eq!((symbol.as_str(), address), (*name, BASE + KASLR + at + 4));
        assert!(
            text.contains(&banner) && banner.contains("7.2.0-test"),
            "{text}"
        );
    }
    // A few that the file lacks do no harm; many do.
    let mut guest = Guest::new(0);
    guest.exported[0].0 = "A";
    guest.locate().unwrap();
    guest.exported[1].0 = "B";
    assert!(guest.locate().is_err());
    guest.exported[1].0 = "";
    assert!(guest.locate().is_err());
}

#[test]
fn other_kernels_are_refused() {
    let mut guest = Guest::new(KASLR);
    guest.lstar = Some(BASE + ENTRY + 0x1000);
    guest.fault = Some(BASE + FAULT + 0x4000_0000);
    assert!(matches!(guest.locate(), Err(LocateError::Elsewhere)));

    let mut guest = Guest::new(KASLR);
    guest.banner = b"Linux versiom 7.2.0\0";
    assert!(matches!(guest.locate(), Err(LocateError::NoBanner)));

    for missing in ["linux_banner", "_end", "_stext"] {
        let guest = Guest::new(0);
        let map: String = guest
            .map(0)
            .lines()
            .filter(|line| !line.ends_with(missing) && !line.ends_with("_text"))
            .map(|line| format!("{line}\n"))
            .collect();
        let error = guest.locate_by(&map).unwrap_err();
        assert!(
            matches!(error, LocateError::Incomplete(name) if name == missing),
            "{error}"
        );
    }
}

#[test]
fn any_vcpu_that_has_the_kernel_mapped_will_do() {
    let mut guest = Guest::new(KASLR);
    guest.mapped = |vcpu| vcpu == 1;
    guest.locate().unwrap();
    guest.mapped = |_| false;
    assert!(matches!(guest.locate(), Err(LocateError::NotMapped)));
}

#[test]
fn failure_to_ask_is_no_difference() {
    let symbols = Symbols::parse(Guest::new(0).map(0).as_bytes()).unwrap();
    let error = with_host(drop, |mut vm| symbols.locate(&mut vm, &[0])).unwrap_err();
    assert!(
        matches!(error, LocateError::Connection(Error::Closed)),
        "{error}"
    );
}

proptest! {
    #[test]
    fn no_file_causes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Symbols::parse(&bytes[..]);
    }

    #[test]
    fn no_map_causes_a_panic(
        lines in proptest::collection::vec(
            (any::<u64>(), "[a-zA-Z]", "(_text|_stext|_end|linux_banner|entry_SYSCALL_64|__st(art|op)___ksymtab|x)", any::<bool>()),
            0..40,
        ),
        near in any::<bool>(),
    ) {
        let mut map = String::from("ffffffff81000000 T z\n");
        for (address, kind, name, module) in lines {
            let address = if near { BASE + (address & 0xfff) } else { address };
            let module = if module { " [m]" } else { "" };
            map += &format!("{address:x} {kind} {name}{module}\n");
        }
        let guest = Guest::new(0);
        if let Ok(kernel) = guest.locate_by(&map) {
            for address in [0, BASE, BASE + 0x100, u64::MAX] {
                kernel.resolve(address);
            }
            let _ = kernel.extent("x");
        }
    }
}
