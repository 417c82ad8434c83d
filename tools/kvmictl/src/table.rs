// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Tables of text.

use std::fmt;

use comfy_table::{presets::NOTHING, CellAlignment};

/// A table for people, or for `awk`: columns with their names above them.
#[derive(Debug)]
pub struct Table(comfy_table::Table);

impl Table {
    /// A table with these columns and no rows.
    pub fn new(columns: &[&str]) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_preset(NOTHING).set_header(columns);
        Self(table)
    }

    /// Adds a row.
    pub fn add(&mut self, row: impl IntoIterator<Item = String>) {
        self.0.add_row(row);
    }

    /// Puts what is in these columns, counted from 0 on, to the right.
    pub fn align_right(mut self, columns: &[usize]) -> Self {
        for column in columns {
            if let Some(column) = self.0.column_mut(*column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        self
    }
}

impl fmt::Display for Table {
    /// Lines without blanks at their ends, and without a line feed at the last one's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, line) in self.0.lines().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            f.write_str(line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_with_what_they_have() {
        let mut table = Table::new(&["N", "NAME"]);
        for (number, name) in [("1", "one"), ("100", "hundred")] {
            table.add([number.to_owned(), name.to_owned()]);
        }
        let text = table.align_right(&[0]).to_string();
        let expected = "   N  NAME\n   1  one\n 100  hundred";
        assert_eq!(text, expected);
    }
}
