#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# live.sh FLAVOUR: a live Linux guest whose kernel's code and constants are locked
# after its boot, then a page table, and in which a busy function is executed step
# by step.

set -u
FLAVOUR=$1
. tools/lab/guest/common.sh
. tools/lab/guest/linux-guest.sh

fail() {
	echo "$*"
	tail -n 5 $console
	exit 1
}

# said_since WHAT LINE: what the guest has said of its code or table since, in whole lines.
said_since() {
	tail -n +"$(($2 + 1))" $console | tr -d '\r' | grep -x "kernel $1: \(changed\|as built\)"
}

# watch WHAT CULPRIT AREA…: who changes it is caught, and may.
watch() {
	what=$1 culprit=$2
	shift 2
	accesses=$(kvmictl guard --pid "$guest" "$@" --count 2) || fail "$accesses"
	echo "$accesses"
	echo "$accesses" | grep -q "$culprit: permitted$" || fail "the culprit is not named"
	expect_ticks 1
	said_since "$what" 0 | tail -n 1 | grep -q changed || fail "what was permitted was not done"
}

# block WHAT CULPRIT AREA…: it stays as it is; as which of both depends on the moment.
block() {
	what=$1 culprit=$2
	shift 2
	kvmictl guard --pid "$guest" "$@" --block --count 14 >/tmp/guard 2>&1 &
	guard=$!
	for _ in $(seq 60); do
		[ "$(grep -c "$culprit: blocked" /tmp/guard)" -lt 2 ] || break
		sleep 1
	done
	from=$(wc -l <$console)
	expect_ticks 2
	seen=$(said_since "$what" "$from" | sort -u)
	wait $guard || fail "$(cat /tmp/guard)"
	tail -n 3 /tmp/guard
	grep -q "$culprit: blocked" /tmp/guard || fail "nothing was blocked"
	[ "$(echo "$seen" | wc -l)" = 1 ] || fail "what was blocked was done: $seen"
	expect_ticks 1
}

start_guest live
export KVMI_SYMBOLS=/tmp/guest.map

# shellcheck disable=SC2086  # two words
watch text "$patcher" $locked
# shellcheck disable=SC2086  # two words
block text "$patcher" $locked

# The page table of an area that the guest uses all the time.
area=$(tr -d '\r' <$console | sed -n 's/^area: //p')
entries=$(kvmictl translate --pid "$guest" --tables "$area") || fail "$entries"
echo "$entries"
entry=$(echo "$entries" | sed -n 's/^level 1: .* at //p')
table=$(printf '0x%x' $((entry & ~0xfff)))
tamperer=' -w- gpa .* by .* tamper+.* \[patcher\]'
watch table "$tamperer" "$table" --deny w
block table "$tamperer" "$table" --deny w

# Every instruction of a function that is always busy.
accesses=$(kvmictl guard --pid "$guest" __schedule --deny x --count 200) || fail "$accesses"
echo "$accesses" | tail -n 2
echo "$accesses" | grep -q -- '--x gpa .* __schedule+0x0/' || fail "it was not entered"
expect_ticks 2

kill "$guest"
wait "$guest"
