# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# Sourced by the scripts of this directory: paths, messages, quiet steps.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${KVMI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kvmi}
LOGS=$ROOT/build/log
V=${V:-0}
JOBS=${JOBS:-$(($(nproc) + 1))}

mkdir -p "$CACHE" "$LOGS"

say() { printf '%s\n' "$*"; }

# die MESSAGE [CURE]: one line each, so that the cure is not overlooked.
die() {
	printf 'error: %s\n' "$1" >&2
	[ $# -lt 2 ] || printf '  cure: %s\n' "$2" >&2
	exit 1
}

# step NAME CURE CMD…: runs CMD with its output in a log file, shows that it
# lives, and on failure names the step, the log and the likely cure.
step() {
	local name=$1 cure=$2 log start ticks=0 rc=0
	shift 2
	log=$LOGS/$(tr -cs 'a-z0-9.\n' - <<<"${name,,}").log
	start=$SECONDS
	# A process group of its own, so that an interrupt ends all of it.
	set -m
	if [ "$V" != 0 ]; then
		say "== $name"
		"$@" > >(tee "$log") 2>&1 </dev/null &
	else
		printf '  %-44s' "$name"
		"$@" >"$log" 2>&1 </dev/null &
	fi
	step_pid=$!
	set +m
	trap 'kill -- -$step_pid 2>/dev/null; exit 130' INT TERM
	while kill -0 $step_pid 2>/dev/null; do
		sleep 0.2
		ticks=$((ticks + 1))
		# A dot per 10 s: long steps are seen to live, in CI's log too.
		[ "$V" != 0 ] || [ $((ticks % 50)) -ne 0 ] || printf .
	done
	wait $step_pid || rc=$?
	trap - INT TERM
	if [ $rc -ne 0 ]; then
		[ "$V" != 0 ] || { say " failed"; tail -n 25 "$log" | sed 's/^/    | /' >&2; }
		die "$name failed; log: $log" "$cure"
	fi
	[ "$V" != 0 ] || say " $((SECONDS - start)) s"
}

# version_ge A B: whether version A is at least B.
version_ge() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }

# version_of CMD…: the first version number that the command prints.
version_of() { "$@" 2>/dev/null | grep -oE '[0-9]+(\.[0-9]+)+' | head -n 1; }
