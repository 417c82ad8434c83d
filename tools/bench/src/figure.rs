// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What was measured, where.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::clock::Unit;

/// On which kernel, in which state of introspection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Setting {
    /// A kernel without the patch series.
    Stock,
    /// A patched kernel, and kvmi_host is not loaded.
    Unloaded,
    /// kvmi_host is loaded, and the VM is not hooked.
    Loaded,
    /// The VM is hooked, and no event is on.
    Hooked,
}

impl Setting {
    /// All of them, from the one without introspection on.
    pub const ALL: [Self; 4] = [Self::Stock, Self::Unloaded, Self::Loaded, Self::Hooked];

    /// Its name in tables.
    pub fn title(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Unloaded => "patched",
            Self::Loaded => "module loaded",
            Self::Hooked => "hooked",
        }
    }
}

/// How what was measured several times is spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The smallest value.
    pub min: f64,
    /// Half of the values are below.
    pub median: f64,
    /// Nine of ten values are below.
    pub p90: f64,
    /// How many values there are.
    pub rounds: usize,
}

impl Spread {
    /// Of at least one value; sorts them.
    pub fn of(values: &mut [u64]) -> Self {
        values.sort_unstable();
        let at = |part: usize| values[(values.len() - 1) * part / 10] as f64;
        Self {
            min: at(0),
            median: at(5),
            p90: at(9),
            rounds: values.len(),
        }
    }

    /// What one of `count` equal parts of this cost, of which `rest` is not part.
    pub fn share(self, rest: Self, count: u32) -> Self {
        let part = |all: f64, rest: f64| (all - rest) / f64::from(count);
        Self {
            min: part(self.min, rest.min),
            median: part(self.median, rest.median),
            p90: part(self.p90, rest.p90),
            rounds: self.rounds,
        }
    }
}

/// One figure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured.
    pub row: String,
    /// Where.
    pub setting: Setting,
    /// In which unit.
    pub unit: Unit,
    /// The figure itself.
    #[serde(flatten)]
    pub spread: Spread,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_leaves_out_outliers() {
        let spread = Spread::of(&mut [7, 5, 6, 1000, 5]);
        assert_eq!((spread.min, spread.median, spread.p90), (5.0, 6.0, 7.0));
        assert_eq!(spread.rounds, 5);
    }

    #[test]
    fn share_is_that_of_one_part() {
        let (all, rest) = (Spread::of(&mut [1050]), Spread::of(&mut [50]));
        assert_eq!(all.share(rest, 100).median, 10.0);
    }
}
