#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# All checks that need no virtual machine.  Each one runs, whatever the others
# say; closes with the sums.

. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/toolchain.sh"

cd "$ROOT"
find_toolchain
TREE=$(realpath build/kernel/lab/source)
passed=0 failed=0 skipped=0
export RUSTFLAGS="-C target-feature=+crt-static"

# check NAME COMMAND…
check() {
	local name=$1 log
	shift
	log=$LOGS/check-${name//[^a-z0-9]/-}.log
	if [ "$V" != 0 ]; then "$@" 2>&1 | tee "$log"; else "$@" >"$log" 2>&1; fi && {
		say "ok      $name"
		passed=$((passed + 1))
		return
	}
	[ "$V" != 0 ] || tail -n 40 "$log" | sed 's/^/    | /'
	say "FAILED  $name; log: $log"
	failed=$((failed + 1))
}

skip() {
	say "skipped $1: $2"
	skipped=$((skipped + 1))
}

in_tools() { (cd tools && cargo "$1" --locked --release --target x86_64-unknown-linux-gnu --workspace "${@:2}"); }
kernel_rust() { git ls-files -co --exclude-standard 'rust/*.rs'; }
scripts() { git ls-files -co --exclude-standard 'tools/*.sh' .ci/run tools/lab/guest/{vm,kvmmem,introspector}-init; }

rustfmt_kernel() { kernel_rust | xargs "$RUSTFMT" --check --edition 2021 --config-path "$TREE/.rustfmt.toml"; }
clippy_kernel() { tools/build/modules.sh build/kernel/lab/kdir build/modules/clippy modules CLIPPY=1 KRUSTFLAGS=-Dwarnings; }
# From standard input: a file that git tracks would be read as source, not as a
# patch.  MAINTAINERS is a matter for those who take the series.
checkpatch() {
	local patch rc=0
	# CAMELCASE: that is how the emulator of KVM names the flags of its opcodes.
	for patch in patches/*/*.patch; do
		perl "$TREE/scripts/checkpatch.pl" --root="$TREE" --strict --terse --show-types \
			--ignore FILE_PATH_CHANGES,CAMELCASE - <"$patch" | sed "s,^-:,$patch:," || rc=1
	done
	return $rc
}
shellcheck_all() { scripts | xargs shellcheck -x -P SCRIPTDIR; }

unit_tests() {
	local log=$LOGS/cargo-test.log result sums
	in_tools test --no-fail-fast >"$log" 2>&1 && result=ok || result=FAILED
	read -r -a sums < <(awk '/^test result:/ { p += $4; f += $6; s += $8 } END { print p + 0, f + 0, s + 0 }' "$log")
	# A crate that does not compile has no failed test.
	[ $result = ok ] || [ "${sums[1]}" -ne 0 ] || sums[1]=1
	[ $result = ok ] || grep -E '^error|^test .*FAILED|panicked at' "$log" | head -n 40 | sed 's/^/    | /'
	printf '%-7s cargo test: %s passed, %s failed; log: %s\n' $result "${sums[0]}" "${sums[1]}" "$log"
	passed=$((passed + sums[0])) failed=$((failed + sums[1])) skipped=$((skipped + sums[2]))
}

check "rustfmt tools" cargo fmt --manifest-path tools/Cargo.toml --all --check
check "rustfmt kernel" rustfmt_kernel
check "clippy tools" in_tools clippy --all-targets -- -D warnings
if [ -n "$CLIPPY_DRIVER" ]; then
	check "clippy kernel" clippy_kernel
else
	skip "clippy kernel" "no clippy of $RUSTC"
fi
check "checkpatch" checkpatch
if command -v shellcheck >/dev/null; then
	check "shellcheck" shellcheck_all
else
	skip "shellcheck" "not installed"
fi
unit_tests

say "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
