#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Runs the benchmarks in the lab, on the unpatched kernel and on ours, and prints
# tables.  All figures are kept in build/bench.

. "$(dirname "$0")/common.sh"

BIN=$ROOT/tools/target/x86_64-unknown-linux-gnu/release
OUT=$ROOT/build/bench
UNITS=(instructions ns)
FLAVOURS=(stock lab)

# measure FLAVOUR UNIT
measure() {
	local options=() out=$OUT/$1-$2
	[ "$2" != instructions ] || options=(--icount)
	"$BIN/lab" run --flavour "$1" --name "bench-$2" --timeout 1200 "${options[@]}" -- \
		sh tools/lab/guest/bench.sh "$1" "$2" >"$out" || { cat "$out"; return 1; }
}

cd "$ROOT"
mkdir -p "$OUT"
rm -f "$OUT"/*
for unit in "${UNITS[@]}"; do
	for flavour in "${FLAVOURS[@]}"; do
		step "measure $unit, $flavour kernel" "see the log" measure "$flavour" "$unit"
	done
done
"$BIN/kvmi_bench" report --json "$OUT/bench.json" "$OUT"/*
