// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Parts of guest memory as they are given, and where they really are.

use std::{ops::Range, os::fd::AsFd, str::FromStr};

use anyhow::Result;
use kvmi_client::{pages, Error, Paused, PAGE_SIZE};

use crate::{address::Address, problem::Problem, symbols::Names};

/// A part of guest memory: a number is a guest physical address, a symbol a virtual one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Area {
    /// What is at an address.
    At(Address),
    /// From one address to another.
    Between(Address, Address),
}

impl FromStr for Area {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((first, end)) = text.split_once("..") else {
            return text.parse().map(Self::At);
        };
        match (first.parse()?, end.parse()?) {
            (Address::Number(first), Address::Number(end)) if first >= end => {
                Err("expected a range that ends above its beginning".to_owned())
            }
            (first, end) if first.is_symbol() == end.is_symbol() => Ok(Self::Between(first, end)),
            _ => Err("expected two numbers, or two symbols".to_owned()),
        }
    }
}

/// Guest memory in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Guest physical addresses.
    pub gpa: Range<u64>,
    /// Virtual address of the first one, if the area was given by symbols.
    pub gva: Option<u64>,
}

impl Area {
    /// Whether symbols are needed to know what it is.
    pub fn needs_symbols(&self) -> bool {
        match self {
            Self::At(address) | Self::Between(address, _) => address.is_symbol(),
        }
    }

    /// Whether it is the one address that a number is.
    pub fn is_number(&self) -> bool {
        matches!(self, Self::At(Address::Number(_)))
    }

    /// Finds the area in a guest that stands still: pages that follow each other make one span.
    /// `size` is that of what is at an address, where that does not say it itself.
    pub fn find<S: AsFd>(
        &self,
        size: Option<u64>,
        names: &Names,
        vm: &mut Paused<'_, S>,
    ) -> Result<Vec<Span>> {
        let range = self.range(size, names)?;
        if !self.needs_symbols() {
            return Ok(vec![Span {
                gpa: range,
                gva: None,
            }]);
        }
        let mut spans: Vec<Span> = Vec::new();
        for piece in pages(range.start, range.end - range.start)? {
            let gpa = translate(vm, piece.gpa)?;
            let end = gpa.saturating_add(piece.len as u64);
            match spans.last_mut() {
                Some(last) if last.gpa.end == gpa => last.gpa.end = end,
                _ => spans.push(Span {
                    gpa: gpa..end,
                    gva: Some(piece.gpa),
                }),
            }
        }
        Ok(spans)
    }

    /// The addresses that are meant, be they physical or virtual. `size` as for [`Self::find`].
    pub fn range(&self, size: Option<u64>, names: &Names) -> Result<Range<u64>> {
        let range = match self {
            Self::At(address) => {
                let start = address.of(names)?;
                let size = match (size, address) {
                    (Some(size), _) => size,
                    (None, Address::Symbol { name, offset: 0 }) => names.size(name)?,
                    (None, Address::Symbol { .. }) => 1,
                    (None, Address::Number(_)) => PAGE_SIZE - start % PAGE_SIZE,
                };
                start.checked_add(size).map(|end| start..end)
            }
            Self::Between(
                Address::Symbol { name, offset: 0 },
                Address::Symbol {
                    name: end,
                    offset: 0,
                },
            ) => Some(names.range(name, end)?),
            Self::Between(first, end) => Some(first.of(names)?..end.of(names)?),
        };
        let Some(range) = range.filter(|range| !range.is_empty()) else {
            let what = "there is nothing between these addresses";
            return Err(Problem::new(what, "the second one must be above the first").into());
        };
        Ok(range)
    }
}

/// Translates an address that is mapped on one of the vCPUs at least: not all of them need to be in
/// the kernel.
pub fn translate<S: AsFd>(vm: &mut Paused<'_, S>, gva: u64) -> Result<u64, Error> {
    let vcpus: Vec<u16> = vm.vcpus().iter().map(|event| event.vcpu).collect();
    for vcpu in vcpus {
        if let Some(gpa) = vm.translate_gva(vcpu, gva)? {
            return Ok(gpa);
        }
    }
    Err(Error::Unmapped(gva))
}

/// The pages that spans touch, each once: the guest physical address of each.
pub fn touched(spans: &[Span]) -> Vec<u64> {
    let page = |span: &Span| (span.gpa.start / PAGE_SIZE)..span.gpa.end.div_ceil(PAGE_SIZE);
    let mut pages: Vec<u64> = spans
        .iter()
        .flat_map(page)
        .map(|gfn| gfn * PAGE_SIZE)
        .collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbols::tests::with_names;

    fn area(text: &str) -> Area {
        text.parse().unwrap()
    }

    #[test]
    fn ranges_are_of_one_kind() {
        assert_eq!(area("0x1000"), Area::At(Address::Number(4096)));
        assert!(matches!(area("4K..8K"), Area::Between(..)));
        assert!(area("_stext.._etext").needs_symbols());
        assert!(!area("1..2").needs_symbols());
        for bad in [
            "",
            "..",
            "1..",
            "..2",
            "2..1",
            "1..1",
            "1.._etext",
            "_stext..2",
            "a..b..c+",
        ] {
            assert!(bad.parse::<Area>().is_err(), "{bad}");
        }
    }

    #[test]
    fn symbols_have_their_own_size_and_numbers_a_page() {
        with_names(|names| {
            let range = |text: &str, size| area(text).range(size, names).unwrap();
            assert_eq!(range("0x1010", None), 0x1010..0x2000);
            assert_eq!(range("0x1ff8", Some(16)), 0x1ff8..0x2008);
            assert_eq!(range("4K..5000", None), 4096..5000);
            let kernel = 0xffff_ffff_8120_0000;
            assert_eq!(range("schedule", None), kernel + 0x100..kernel + 0x200);
            assert_eq!(range("schedule", Some(8)), kernel + 0x100..kernel + 0x108);
            assert_eq!(range("schedule+4", None), kernel + 0x104..kernel + 0x105);
            assert_eq!(range("_stext..schedule", None), kernel..kernel + 0x100);
            assert_eq!(
                range("_stext+1..schedule+1", None),
                kernel + 1..kernel + 0x101
            );
            for bad in [
                "schedule.._stext",
                "schedule+1.._stext+1",
                "nothing",
                "nothing.._end",
            ] {
                assert!(area(bad).range(None, names).is_err(), "{bad}");
            }
            assert!(area("0").range(Some(0), names).is_err());
            assert!(area("1").range(Some(u64::MAX), names).is_err());
        });
    }

    #[test]
    fn pages_are_touched_once() {
        let span = |gpa| Span { gpa, gva: None };
        let spans = [
            span(0x5ff8..0x6008),
            span(0x1000..0x2000),
            span(0x6100..0x6101),
        ];
        assert_eq!(touched(&spans), [0x1000, 0x5000, 0x6000]);
    }
}
