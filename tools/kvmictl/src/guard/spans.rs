// SPDX-License-Identifier: GPL-2.0 OR MIT

//! What is guarded in the pages that are restricted.

use std::ops::Range;

use crate::area::Span;

/// Spans of memory, in the order of their addresses.
#[derive(Debug)]
pub struct Spans(Vec<Span>);

impl Spans {
    /// Takes spans; of those that overlap, the one that begins first has what they share.
    pub fn new(mut spans: Vec<Span>) -> Self {
        spans.sort_by_key(|span| span.gpa.start);
        let mut end = 0;
        spans.retain_mut(|span| {
            span.begin_at(end);
            end = end.max(span.gpa.end);
            !span.gpa.is_empty()
        });
        Self(spans)
    }

    /// The first span that has one of these bytes.
    pub fn overlapping(&self, bytes: Range<u64>) -> Option<&Span> {
        let behind = self.0.partition_point(|span| span.gpa.end <= bytes.start);
        self.0.get(behind).filter(|span| span.gpa.start < bytes.end)
    }

    /// How many bytes there are.
    pub fn size(&self) -> u64 {
        self.0
            .iter()
            .map(|span| span.gpa.end - span.gpa.start)
            .sum()
    }
}

impl Span {
    /// Leaves out what is before an address.
    fn begin_at(&mut self, gpa: u64) {
        let start = self.gpa.start.max(gpa.min(self.gpa.end));
        self.gva = self.virtual_address(start);
        self.gpa.start = start;
    }

    /// The virtual address by which the area was given, of a physical one; that of the first byte if
    /// it is before that.
    pub fn virtual_address(&self, gpa: u64) -> Option<u64> {
        let offset = gpa.saturating_sub(self.gpa.start);
        self.gva?.checked_add(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_found_by_any_byte_of_theirs() {
        let span = |gpa: Range<u64>| {
            let gva = Some(gpa.start + 0x1_0000);
            Span { gpa, gva }
        };
        let spans = Spans::new(vec![span(0x5000..0x5008), span(0x1000..0x3000)]);
        let at = |bytes| spans.overlapping(bytes).map(|span| span.gpa.start);
        assert_eq!(at(0..0x1000), None);
        assert_eq!(at(0xfff..0x1001), Some(0x1000));
        assert_eq!(at(0x2fff..0x3000), Some(0x1000));
        assert_eq!(at(0x3000..0x5000), None);
        assert_eq!(at(0x4ff8..0x5001), Some(0x5000));
        assert_eq!(at(0x5007..0x5008), Some(0x5000));
        assert_eq!(at(0x5008..0x6000), None);
        assert_eq!(spans.size(), 0x2008);
        let overlapping = [
            0x1000..0x3000,
            0x1800..0x2000,
            0x2800..0x3001,
            0x1000..0x1001,
        ];
        let overlapping = Spans::new(overlapping.map(span).into());
        assert_eq!(overlapping.size(), 0x2001);
        let last = overlapping.overlapping(0x3000..0x3001).unwrap();
        assert_eq!((last.gpa.start, last.gva), (0x3000, Some(0x1_3000)));
        let span = spans.overlapping(0x5000..0x5001).unwrap();
        assert_eq!(span.virtual_address(0x5004), Some(0x1_5004));
        assert_eq!(span.virtual_address(0x4ff8), Some(0x1_5000));
    }
}
