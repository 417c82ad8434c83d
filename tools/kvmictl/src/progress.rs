// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A bar on the standard error while something takes long.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Less than this, in bytes, is done before a bar could be seen.
const WORTH_A_BAR: u64 = 4 << 20;

/// A bar for `bytes` of guest memory. It is shown on terminals only, and unless `quiet`.
pub fn bar(bytes: u64, quiet: bool) -> ProgressBar {
    if quiet || bytes < WORTH_A_BAR {
        return ProgressBar::hidden();
    }
    let target = ProgressDrawTarget::stderr_with_hz(5);
    let bar = ProgressBar::with_draw_target(Some(bytes), target);
    let template = "{wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_work_has_no_bar() {
        assert!(bar(4096, false).is_hidden());
        assert!(bar(1 << 30, true).is_hidden());
    }
}
