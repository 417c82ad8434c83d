#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# live.sh FLAVOUR: a live Linux guest whose kernel is locked after its boot: its
# code and constants, some of its page tables, and a function that is always busy.

set -u
FLAVOUR=$1
. tools/lab/guest/common.sh
. tools/lab/guest/linux-guest.sh

fail() {
	echo "$*"
	tail -n 5 $console
	exit 1
}

# guard ARGUMENT…: leaves in $accesses what kvmictl reports.
guard() {
	echo "guard $*"
	accesses=$(kvmictl guard --pid "$guest" "$@") || fail "$accesses"
	echo "$accesses" | tail -n 3
}

# entry TABLE INDEX: the table that a page table's entry points to.
entry() {
	value=$(kvmictl read --pid "$guest" --format raw $(($1 + 8 * $2)) 8 | od -An -t x8 | tr -d ' ')
	[ $((0x$value & 1)) = 1 ] || return 1
	echo $((0x$value & 0xffffffffff000))
}

locked="_stext.._etext __start_rodata..__end_rodata"
culprit=' -w- gpa .* orderly_poweroff+0x0/.* by .* patch+.* \[patcher\]'

start_guest live
export KVMI_SYMBOLS=/tmp/guest.map

# shellcheck disable=SC2086  # two words
guard $locked --count 2
echo "$accesses" | grep -q "$culprit: permitted$" || fail "the culprit is not named"
grep '^kernel code' $console | tail -n 1 | grep -q changed || fail "what was permitted was not done"
expect_ticks 1

# shellcheck disable=SC2086  # two words
guard $locked --block --count 4
echo "$accesses" | grep -q "$culprit: blocked" || fail "nothing was blocked"
grep -q '^kernel code: as built' $console || fail "what was blocked was done"
expect_ticks 1

# The page tables of the first MiBs of where vmap() and stacks of threads are.
top=$(kvmictl translate --pid "$guest" init_top_pgt | tail -n 1)
middle=$(entry "$(entry "$top" $((0x192)))" 0) || fail "no page tables of vmalloc()"
tables=$(for nth in 0 1 2 3; do
	! table=$(entry "$middle" $nth) || echo "$table..$((table + 4096))"
done)
# shellcheck disable=SC2086  # several words
guard $tables --count 20
[ "$(echo "$accesses" | grep -c -- '-w- .*: permitted$')" = 20 ] || fail "too few accesses"
expect_ticks 1

# Every instruction on its page.
guard schedule --deny x --count 200
echo "$accesses" | grep -q -- '--x gpa .* schedule+0x0/' || fail "it was not entered"
expect_ticks 2

kill "$guest"
wait "$guest"
