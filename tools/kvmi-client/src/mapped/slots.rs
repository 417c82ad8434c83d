// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Which pages of a window are in use.

/// The pages of a window.
#[derive(Debug)]
pub(super) struct Slots(Vec<bool>);

impl Slots {
    /// All of `pages` are free.
    pub(super) fn new(pages: usize) -> Self {
        Self(vec![false; pages])
    }

    /// The most free pages in a row.
    pub(super) fn longest_free(&self) -> usize {
        let runs = self.0.split(|taken| *taken);
        runs.map(<[bool]>::len).max().unwrap_or(0)
    }

    /// Takes `count` free pages in a row; returns the index of the first one.
    pub(super) fn take(&mut self, count: usize) -> Option<usize> {
        let mut free = 0;
        for (at, taken) in self.0.iter().enumerate() {
            free = if *taken { 0 } else { free + 1 };
            if free == count {
                let first = at + 1 - count;
                self.0.get_mut(first..=at)?.fill(true);
                return Some(first);
            }
        }
        None
    }

    /// Has pages be free again.
    pub(super) fn give_back(&mut self, first: usize, count: usize) {
        let pages = self.0.iter_mut().skip(first).take(count);
        pages.for_each(|taken| *taken = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_taken_in_a_row_and_once() {
        let mut slots = Slots::new(8);
        assert_eq!(slots.take(3), Some(0));
        assert_eq!(slots.take(4), Some(3));
        assert_eq!(slots.take(2), None);
        assert_eq!(slots.take(1), Some(7));
        assert_eq!(slots.take(1), None);
        assert_eq!(slots.longest_free(), 0);
    }

    #[test]
    fn pages_can_be_taken_again() {
        let mut slots = Slots::new(4);
        for _ in 0..4 {
            slots.take(1);
        }
        slots.give_back(0, 1);
        assert_eq!(slots.longest_free(), 1);
        slots.give_back(2, 2);
        assert_eq!(slots.longest_free(), 2);
        assert_eq!(slots.take(2), Some(2), "0 has no free neighbour");
        assert_eq!(slots.take(1), Some(0));
    }

    #[test]
    fn more_than_there_is_cannot_be_had() {
        let mut slots = Slots::new(2);
        assert_eq!(slots.take(3), None);
        assert_eq!(slots.longest_free(), 2);
    }
}
