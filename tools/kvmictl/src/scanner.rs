// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Searching a stream of memory.

use memchr::memmem::Finder;

/// Finds a pattern in memory that comes in pieces, also across them.
pub struct Scanner<'p> {
    finder: Finder<'p>,
    /// The end of the piece before, too short to contain the pattern, and the current piece.
    window: Vec<u8>,
    /// Address of the first byte of the window.
    start: u64,
}

impl<'p> Scanner<'p> {
    /// Searches for `pattern`, which must not be empty.
    pub fn new(pattern: &'p [u8]) -> Self {
        Self {
            finder: Finder::new(pattern),
            window: Vec::new(),
            start: 0,
        }
    }

    /// Searches the piece of memory at `gpa`, together with the end of the one before if that
    /// is where this one begins. Gives the address of each occurrence to `found` until that
    /// returns `false`, and then does so too.
    pub fn push(&mut self, gpa: u64, piece: &[u8], mut found: impl FnMut(u64) -> bool) -> bool {
        if self.start.wrapping_add(self.window.len() as u64) != gpa {
            self.window.clear();
            self.start = gpa;
        }
        self.window.extend_from_slice(piece);

        let mut from = 0;
        while let Some(at) = self.window.get(from..).and_then(|w| self.finder.find(w)) {
            if !found(self.start.wrapping_add((from + at) as u64)) {
                return false;
            }
            // Occurrences may overlap.
            from += at + 1;
        }

        let keep = self.finder.needle().len().saturating_sub(1);
        let done = self.window.len().saturating_sub(keep);
        self.window.drain(..done);
        self.start = self.start.wrapping_add(done as u64);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(pattern: &[u8], pieces: &[(u64, &[u8])]) -> Vec<u64> {
        let mut scanner = Scanner::new(pattern);
        let mut hits = Vec::new();
        for (gpa, piece) in pieces {
            let more = scanner.push(*gpa, piece, |hit| {
                hits.push(hit);
                true
            });
            assert!(more);
        }
        hits
    }

    #[test]
    fn occurrences_across_pieces_are_found_once() {
        assert_eq!(find(b"abc", &[(10, b"xxab"), (14, b"cabc")]), [12, 15]);
        assert_eq!(find(b"abc", &[(10, b"a"), (11, b"b"), (12, b"c")]), [10]);
        assert_eq!(find(b"a", &[(10, b"aa"), (12, b"a")]), [10, 11, 12]);
    }

    #[test]
    fn occurrences_may_overlap() {
        assert_eq!(find(b"aa", &[(0, b"aaa"), (3, b"a")]), [0, 1, 2]);
    }

    #[test]
    fn memory_across_a_gap_is_not_contiguous() {
        assert!(find(b"abc", &[(10, b"ab"), (13, b"c")]).is_empty());
        assert_eq!(find(b"abc", &[(10, b"ab"), (4096, b"abc")]), [4096]);
    }

    #[test]
    fn search_ends_when_enough_is_found() {
        let mut hits = 0;
        let more = Scanner::new(b"a").push(0, b"aaaa", |_| {
            hits += 1;
            hits < 2
        });
        assert_eq!((more, hits), (false, 2));
    }

    #[test]
    fn pieces_of_any_size_give_the_same() {
        let memory: Vec<u8> = (0..2000u32)
            .map(|i| b"abab"[(i * i % 4) as usize])
            .collect();
        let whole = find(b"aab", &[(0, &memory)]);
        for size in [1, 2, 3, 7, 64] {
            let pieces: Vec<_> = memory
                .chunks(size)
                .enumerate()
                .map(|(i, piece)| ((i * size) as u64, piece))
                .collect();
            assert_eq!(find(b"aab", &pieces), whole);
        }
    }
}
