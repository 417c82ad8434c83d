#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# bench-live.sh: runs in the lab.  What the work of a live Linux guest takes while a tool
# is told of what it does, and lets it: one line for each kind of event.

set -u
FLAVOUR=lab
. tools/lab/guest/common.sh
. tools/lab/guest/linux-guest.sh

# So often the guest does its work for each line, after once with which the tool interferes.
# The quickest counts: what else the machine does makes it slower only.
passes=15

fail() {
	echo "failed: $*" >&2
	exit 1
}

passed() { grep -c '^work:' $console; }

# measure: prints the shortest time of the next passes, in ms.
measure() {
	first=$(($(passed) + 2))
	last=$((first + passes - 1))
	until [ "$(passed)" -ge $last ]; do
		kill -0 "$guest" || fail "the guest has ended"
		sleep 0.2
	done
	tr -d '\r' <$console | sed -n 's/^work: //p' | sed -n "$first,${last}p" |
		awk '{ print int(($2 - $1) * 1000 + 0.5) }' | sort -n | head -n 1
}

# line WHAT [OPTION]…: with these options of kvmictl trace.
line() {
	what=$1
	shift
	if [ $# -eq 0 ]; then
		time=$(measure) || exit 1
		base=${base:-$time} events=
	else
		"$BIN/kvmictl" trace --pid "$guest" --summary "$@" >/tmp/trace 2>&1 &
		tracer=$!
		time=$(measure) || exit 1
		kill $tracer
		wait $tracer || fail "$(cat /tmp/trace)"
		events=$(awk '$2 ~ /^[0-9]+$/ { sum += $2 } END { print sum + 0 }' /tmp/trace)
	fi
	echo "$what|$events|$time|$base"
}

# The figures of one boot of the machine can be compared.
{ load_kvm && insmod "$PROVIDER"; } || fail "KVM cannot be loaded"
parameters="$parameters work=1"
launch_guest work
wait_for 60 '^work:' || fail "the guest does not work: $(cat $console)"
{
	line "no tool"
	line "CR0 and CR4" --cr 0,4
	line "MSRs (EFER, LSTAR)" --msr EFER,LSTAR
	line "XSETBV" --xsetbv
	line "descriptor tables" --descriptors
	line "hypercalls" --hypercall
	line "breakpoints" --breakpoint
	line "CR3" --cr 3
	line "all" --cr 0,3,4 --msr EFER,LSTAR --xsetbv --descriptors --hypercall --breakpoint
	line "no tool any more"
} >/tmp/lines
awk -F '|' '
	BEGIN {
		print "| events | told of, of all passes | work takes | than without a tool |"
		print "|---|---|---|---|"
	}
	{ printf "| %s | %s | %d ms | %.2f |\n", $1, $2, $3, $3 / $4 }' /tmp/lines
