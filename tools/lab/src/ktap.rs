// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Sums up KTAP: how many tests passed, failed and were skipped.

use std::fmt;

/// What the lines so far add up to.
///
/// A test with subtests is the sum of those and not counted itself, unless it
/// failed although none of them did.
#[derive(Default)]
pub struct Sums {
    passed: u32,
    failed: u32,
    skipped: u32,
    /// Subtests seen since the last result, by depth of indentation.
    open: Vec<Level>,
}

struct Level {
    indent: usize,
    failed: bool,
}

impl Sums {
    /// Takes one line of output; lines that are no result change nothing.
    pub fn line(&mut self, line: &str) {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        let (ok, rest) = if let Some(rest) = text.strip_prefix("not ok ") {
            (false, rest)
        } else if let Some(rest) = text.strip_prefix("ok ") {
            (true, rest)
        } else {
            return;
        };
        if !rest.starts_with(|c: char| c.is_ascii_digit()) {
            return;
        }

        let mut subtests = false;
        let mut subtest_failed = false;
        while self.open.last().is_some_and(|level| level.indent > indent) {
            subtest_failed |= self.open.pop().is_some_and(|level| level.failed);
            subtests = true;
        }
        if rest.contains("# SKIP") {
            self.skipped += 1;
        } else if !subtests || (!ok && !subtest_failed) {
            self.count(ok);
        }
        match self.open.last_mut() {
            Some(level) if level.indent == indent => level.failed |= !ok,
            _ => self.open.push(Level {
                indent,
                failed: !ok,
            }),
        }
    }

    /// Adds a result of the caller's own and prints it.
    pub fn result(&mut self, ok: bool, name: &str) {
        println!("{} - {name}", if ok { "ok" } else { "not ok" });
        self.count(ok);
    }

    /// The number of tests that failed.
    pub fn failed(&self) -> u32 {
        self.failed
    }

    fn count(&mut self, ok: bool) {
        if ok {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
    }
}

impl fmt::Display for Sums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::Sums;

    fn sums(text: &str) -> String {
        let mut sums = Sums::default();
        text.lines().for_each(|line| sums.line(line));
        sums.to_string()
    }

    #[test]
    fn counts_leaves_only() {
        let text =
            "KTAP version 1\n1..3\n  KTAP version 1\n  ok 1 a\n  not ok 2 b\nnot ok 1 suite\n\
                    ok 2 alone\nok 3 other # SKIP no hardware\n";
        assert_eq!(sums(text), "2 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn counts_a_suite_that_failed_by_itself() {
        assert_eq!(
            sums("  ok 1 a\nnot ok 1 crashed\n"),
            "1 passed, 1 failed, 0 skipped"
        );
    }

    #[test]
    fn subtests_belong_to_the_next_result_only() {
        assert_eq!(
            sums("  not ok 1 a\nnot ok 1 s\nnot ok 2 t\n"),
            "0 passed, 2 failed, 0 skipped"
        );
    }

    #[test]
    fn ignores_other_lines() {
        assert_eq!(
            sums("ok\nok computer\n# ok 1\n"),
            "0 passed, 0 failed, 0 skipped"
        );
    }
}
