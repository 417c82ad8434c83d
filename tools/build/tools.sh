#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Builds the programs in tools/ as static binaries: they run on the machine and
# in an initramfs alike.

. "$(dirname "$0")/common.sh"

cd "$ROOT/tools"
# With --target the flags spare build scripts and macros, which cannot be static.
export RUSTFLAGS="-C target-feature=+crt-static"
step "build the tools" "see the first error in the log" \
	cargo build --locked --release --target x86_64-unknown-linux-gnu --workspace --bins --examples
