// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Symbols in the order of their addresses, and of their names.

use std::{cmp::Ordering, collections::HashMap, ops::Range};

use super::Place;

/// How far a symbol of a module may reach, of which the end is not known: to that of its page.
const PAGE: u64 = 4096;

/// Why a name does not lead to an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LookupError {
    /// There is no such symbol.
    #[error("the guest's kernel has no symbol {0:?}")]
    Unknown(String),
    /// Several symbols have the name.
    #[error("the guest's kernel has {count} symbols {symbol:?}, at {list}", count = .addresses.len(), list = list(.addresses))]
    Ambiguous {
        /// The name.
        symbol: String,
        /// Their addresses.
        addresses: Vec<u64>,
    },
    /// The symbol's value is not an address of the kernel: a constant, or an offset in the memory
    /// of a CPU.
    #[error("{0:?} is a constant, or belongs to each CPU: it has no address of its own")]
    NotAnAddress(String),
    /// A range that ends before it begins.
    #[error("{end:?} comes before {first:?}")]
    Backwards {
        /// The first symbol.
        first: String,
        /// The other one.
        end: String,
    },
}

fn list(addresses: &[u64]) -> String {
    let list: Vec<_> = addresses.iter().map(|at| format!("{at:#x}")).collect();
    list.join(", ")
}

/// A symbol: 16 bytes, and its name.
#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    /// Where its name begins.
    name: u32,
    /// Which module it is in, from 1 on; 0 is the kernel proper.
    module: u16,
    /// Its type, as `nm` has it.
    kind: u8,
}

impl Entry {
    fn is_code(&self) -> bool {
        matches!(self.kind, b't' | b'T' | b'w' | b'W')
    }

    fn is_global(&self) -> bool {
        self.kind.is_ascii_uppercase()
    }
}

/// Takes symbols in any order.
#[derive(Debug, Default)]
pub(super) struct Builder {
    names: String,
    modules: Vec<Box<str>>,
    module_numbers: HashMap<Box<str>, u16>,
    entries: Vec<Entry>,
}

impl Builder {
    /// Adds a symbol, whose name is without line feeds; `None` if that is one too many.
    pub(super) fn add(
        &mut self,
        address: u64,
        kind: u8,
        name: &str,
        module: Option<&str>,
    ) -> Option<()> {
        let module = match module {
            Some(module) => self.module(module)?,
            None => 0,
        };
        self.entries.push(Entry {
            address,
            name: self.names.len().try_into().ok()?,
            module,
            kind,
        });
        self.names.push_str(name);
        self.names.push('\n');
        Some(())
    }

    fn module(&mut self, name: &str) -> Option<u16> {
        if let Some(number) = self.module_numbers.get(name) {
            return Some(*number);
        }
        let number = u16::try_from(self.modules.len() + 1).ok()?;
        self.modules.push(name.into());
        self.module_numbers.insert(name.into(), number);
        Some(number)
    }

    /// Puts them in order.
    pub(super) fn finish(self) -> Table {
        let mut table = Table {
            names: self.names.into(),
            modules: self.modules,
            by_address: self.entries,
            by_name: Vec::new(),
        };
        let mut entries = std::mem::take(&mut table.by_address);
        entries.sort_by(|a, b| table.by_address_and_use(a, b));
        entries.dedup_by(|a, b| {
            let same = (a.address, a.module) == (b.address, b.module);
            same && table.name(a) == table.name(b)
        });
        entries.shrink_to_fit();
        table.by_address = entries;
        table.index();
        table
    }
}

/// All symbols, found by binary search.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// All names, each with a line feed behind it.
    names: Box<str>,
    modules: Vec<Box<str>>,
    by_address: Vec<Entry>,
    /// Positions in `by_address`.
    by_name: Vec<u32>,
}

impl Table {
    pub(super) fn count(&self) -> usize {
        self.by_address.len()
    }

    fn name(&self, entry: &Entry) -> &str {
        // Lossless on all machines that have KVM.
        let rest = self.names.get(entry.name as usize..).unwrap_or_default();
        rest.split_once('\n').map_or(rest, |(name, _)| name)
    }

    /// By address; of several symbols at one, the one that tells people most comes first.
    fn by_address_and_use(&self, a: &Entry, b: &Entry) -> Ordering {
        let rank = |entry: &Entry| {
            let name = self.name(entry);
            let weak = matches!(entry.kind, b'w' | b'W');
            // What a linker script puts at the borders of sections.
            let border = name.starts_with("__start_")
                || name.starts_with("__stop_")
                || name.ends_with("_start")
                || name.ends_with("_end");
            let underscores = name.len() - name.trim_start_matches('_').len();
            (weak, border, underscores, !entry.is_global(), entry.module)
        };
        let by_rank = || rank(a).cmp(&rank(b));
        let by_name = || self.name(a).cmp(self.name(b));
        a.address
            .cmp(&b.address)
            .then_with(by_rank)
            .then_with(by_name)
    }

    fn index(&mut self) {
        // Names have 32 bits' worth of bytes, so there are fewer of them.
        let mut order: Vec<u32> = (0..).take(self.by_address.len()).collect();
        order.sort_unstable_by_key(|at| (self.nth(*at).map(|entry| self.name(entry)), *at));
        self.by_name = order;
    }

    fn nth(&self, at: u32) -> Option<&Entry> {
        self.by_address.get(at as usize)
    }

    /// Forgets the symbols of modules.
    pub(super) fn drop_modules(&mut self) {
        self.by_address.retain(|entry| entry.module == 0);
        self.index();
    }

    /// All symbols with a name.
    fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Entry> {
        let name_at = |at: &u32| self.nth(*at).map_or("", |entry| self.name(entry));
        let first = self.by_name.partition_point(|at| name_at(at) < name);
        let rest = self.by_name.get(first..).unwrap_or_default();
        rest.iter()
            .take_while(move |at| name_at(at) == name)
            .filter_map(|at| self.nth(*at))
    }

    /// The address of a symbol of the kernel proper, if it has just one.
    pub(super) fn kernel_symbol(&self, name: &str) -> Option<u64> {
        let mut found = self.named(name).filter(|entry| entry.module == 0);
        let first = found.next()?;
        found.next().is_none().then_some(first.address)
    }

    /// Whether any symbol of the kernel proper with this name has this address; `None` if there is
    /// no symbol with this name.
    pub(super) fn has(&self, name: &str, address: u64) -> Option<bool> {
        self.named(name)
            .filter(|entry| entry.module == 0)
            .map(|entry| entry.address == address)
            .reduce(|a, b| a | b)
    }

    pub(super) fn resolve(&self, address: u64, image: &Range<u64>) -> Option<Place<'_>> {
        let next = self
            .by_address
            .partition_point(|entry| entry.address <= address);
        let last = self.by_address.get(next.checked_sub(1)?)?;
        // The first one at that address.
        let first = self
            .by_address
            .partition_point(|entry| entry.address < last.address);
        let entry = self.by_address.get(first)?;
        if entry.module == 0 && !(image.contains(&entry.address) && image.contains(&address)) {
            return None;
        }
        let end = self.end(entry, self.by_address.get(next), image);
        if entry.module != 0 && address > end.map_or(entry.address | (PAGE - 1), |end| end - 1) {
            return None;
        }
        Some(Place {
            symbol: self.name(entry),
            offset: address - entry.address,
            size: end.map(|end| end - entry.address),
            module: self.module(entry),
        })
    }

    fn module(&self, entry: &Entry) -> Option<&str> {
        let at = usize::from(entry.module).checked_sub(1)?;
        self.modules.get(at).map(AsRef::as_ref)
    }

    /// Where a symbol ends, if known, given the next one with a higher address.
    fn end(&self, entry: &Entry, next: Option<&Entry>, image: &Range<u64>) -> Option<u64> {
        match next {
            // Code and data of a module need not be next to each other.
            Some(next) if entry.module != 0 => {
                let joined = next.module == entry.module && next.is_code() == entry.is_code();
                joined.then_some(next.address)
            }
            None if entry.module != 0 => None,
            Some(next) => Some(next.address.min(image.end)),
            None => Some(image.end),
        }
        .filter(|end| *end > entry.address)
    }

    /// From the beginning of a symbol to that of the next one, or nothing behind it. The image is
    /// as in the table, and the addresses are, but for those in an error: they are moved.
    pub(super) fn extent(
        &self,
        symbol: &str,
        image: &Range<u64>,
        moved: u64,
    ) -> Result<Range<u64>, LookupError> {
        let entry = match symbol.split_once(':') {
            Some((module, name)) => {
                let of_module = |entry: &&Entry| self.module(entry) == Some(module);
                self.choose(symbol, self.named(name).filter(of_module).collect(), moved)?
            }
            None => {
                let (kernels, others): (Vec<&Entry>, Vec<_>) =
                    self.named(symbol).partition(|entry| {
                        let inside = image.contains(&entry.address) || entry.address == image.end;
                        entry.module == 0 && inside
                    });
                let modules: Vec<_> = others.iter().filter(|entry| entry.module != 0).collect();
                if kernels.is_empty() && modules.is_empty() && !others.is_empty() {
                    return Err(LookupError::NotAnAddress(symbol.to_owned()));
                }
                match kernels.is_empty() {
                    true => self.choose(symbol, modules.into_iter().copied().collect(), moved)?,
                    false => self.choose(symbol, kernels, moved)?,
                }
            }
        };
        let next = self
            .by_address
            .partition_point(|other| other.address <= entry.address);
        let end = self.end(entry, self.by_address.get(next), image);
        Ok(entry.address..end.unwrap_or(entry.address))
    }

    /// The only one of several symbols, or the only global one.
    fn choose<'a>(
        &self,
        symbol: &str,
        found: Vec<&'a Entry>,
        moved: u64,
    ) -> Result<&'a Entry, LookupError> {
        let mut global = found.iter().filter(|entry| entry.is_global());
        match (found.as_slice(), global.next(), global.next()) {
            ([], ..) => Err(LookupError::Unknown(symbol.to_owned())),
            ([one], ..) | (_, Some(one), None) => Ok(one),
            _ => Err(LookupError::Ambiguous {
                symbol: symbol.to_owned(),
                addresses: found
                    .iter()
                    .map(|entry| entry.address.wrapping_add(moved))
                    .collect(),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
