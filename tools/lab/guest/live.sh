#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# live.sh FLAVOUR: a live Linux guest whose kernel's code and constants are locked
# after its boot, and in which a busy function is executed step by step.

set -u
FLAVOUR=$1
. tools/lab/guest/common.sh
. tools/lab/guest/linux-guest.sh

fail() {
	echo "$*"
	tail -n 5 $console
	exit 1
}

# code_since LINE: what the guest has said of its code since, in whole lines.
code_since() {
	tail -n +"$(($1 + 1))" $console | tr -d '\r' | grep -x 'kernel code: \(changed\|as built\)'
}

culprit=' -w- gpa .* orderly_poweroff+0x0/.* by .* patch+.* \[patcher\]'

start_guest live
export KVMI_SYMBOLS=/tmp/guest.map

# shellcheck disable=SC2086  # two words
accesses=$(kvmictl guard --pid "$guest" $locked --count 2) || fail "$accesses"
echo "$accesses"
echo "$accesses" | grep -q "$culprit: permitted$" || fail "the culprit is not named"
expect_ticks 1
code_since 0 | tail -n 1 | grep -q changed || fail "what was permitted was not done"

# Blocked, the code stays as it is: which of both depends on the moment.
# shellcheck disable=SC2086  # two words
kvmictl guard --pid "$guest" $locked --block --count 14 >/tmp/guard 2>&1 &
guard=$!
for _ in $(seq 60); do
	[ "$(grep -c "$culprit: blocked" /tmp/guard)" -lt 2 ] || break
	sleep 1
done
from=$(wc -l <$console)
expect_ticks 2
seen=$(code_since "$from" | sort -u)
wait $guard || fail "$(cat /tmp/guard)"
tail -n 3 /tmp/guard
grep -q "$culprit: blocked" /tmp/guard || fail "nothing was blocked"
[ "$(echo "$seen" | wc -l)" = 1 ] || fail "what was blocked was done: $seen"
expect_ticks 1

# Every instruction of a function that is always busy.
accesses=$(kvmictl guard --pid "$guest" __schedule --deny x --count 200) || fail "$accesses"
echo "$accesses" | tail -n 2
echo "$accesses" | grep -q -- '--x gpa .* __schedule+0x0/' || fail "it was not entered"
expect_ticks 2

kill "$guest"
wait "$guest"
