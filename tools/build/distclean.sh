#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Removes the cache: kernel sources and builds, downloads, tools.

. "$(dirname "$0")/common.sh"

exec 9>"$CACHE/lock"
flock -n 9 || die "another build uses $CACHE" "wait for it"
# By name: KVMI_CACHE may be a folder that holds other things too.
rm -rf "$CACHE/apt" "$CACHE/bochs" "$CACHE/download" "$CACHE/tools" "$CACHE"/linux-* "$CACHE"/own.* "$CACHE/lock" "$ROOT/build"
rmdir --ignore-fail-on-non-empty "$CACHE"
