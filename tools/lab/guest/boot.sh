#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# boot.sh FLAVOUR: runs in the lab.  A Linux guest boots while a tool is told of all that
# it does to its registers, and lets it; then the tool stops it at functions of its
# kernel, and executes instruction after instruction.

set -u
FLAVOUR=$1
. tools/lab/guest/common.sh
. tools/lab/guest/linux-guest.sh

# Two processes of the guest take turns so often.
turns=500

caption() { printf '\n== %s\n' "$*"; }
fail() {
	printf '\nboot failed: %s\n' "$*"
	tail -n 20 $console
	exit 1
}

# show COMMAND…: prints and runs it.
show() {
	echo "$ $*"
	"$@"
}

# expect WHAT PATTERN: in what the trace has printed.
expect() { grep -qE "$2" /tmp/trace || fail "there is no $1 in the trace"; }

# told WHAT: what the guest has counted itself.
told() { tr -d '\r' <$console | sed -n "s/^$1: //p"; }

# counted WHAT: of these events, by the table at the end of the trace.
counted() { awk -v what="$1" '$1 == what { print $2 }' /tmp/trace | tail -n 1; }

[ -e /sys/module/kvmi_host ] || { load_kvm && insmod "$PROVIDER"; } || fail "KVM cannot be loaded"

caption "Trace a guest from its first instruction on"
rm -f /tmp/monitor.in /tmp/monitor.out
mkfifo /tmp/monitor.in /tmp/monitor.out
parameters="$parameters turns=$turns"
launch_guest boot -S -monitor pipe:/tmp/monitor
for _ in $(seq 30); do
	! kvmictl list | grep -q "^ *$guest " || break
	sleep 1
done
export KVMI_SYMBOLS="$map"
echo "$ kvmictl trace --pid $guest --cr 0,3,4 --msr LSTAR,EFER --xsetbv --descriptors"
"$BIN/kvmictl" trace --pid $guest --cr 0,3,4 --msr LSTAR,EFER --xsetbv --descriptors >/tmp/trace 2>&1 &
tracer=$!
# It asks the vCPUs for their attention, which they give it before their first instruction.
for _ in $(seq 100); do
	! kvmictl list | grep -q "^ *$guest .*[^-]$" || break
	sleep 0.1
done
echo cont >/tmp/monitor.in
await_guest
expect_ticks 3
kill $tracer
wait $tracer || fail "$(tail /tmp/trace)"
head -n 5 /tmp/trace
echo "..."
grep -E ' (EFER|LSTAR) ' /tmp/trace | head -n 4
grep ' CR3 ' /tmp/trace | tail -n 2
tail -n 10 /tmp/trace
expect "entry of system calls" 'vCPU 0 .* LSTAR 0x0 -> 0xffffffff8'
expect "long mode" 'vCPU 0 .* EFER .* [+]LM'
expect "paging" 'vCPU 0 .* CR0 .* [+]PG'
expect "interrupt descriptor table" 'vCPU 0 .* LIDT'
expect "switch of page tables" ' switch_mm_irqs_off[+].* CR3 '

caption "Writes to CR3 are the guest's switches between processes"
# A turn takes two.  Switches to threads of the kernel and back are none, new programs are
# one without a switch.  Some are from after the guest has looked.
echo "$(counted CR3) writes to CR3; the guest says: $(told ctxt) switches, $(told processes) processes"
[ "$(counted CR3)" -ge $((2 * turns)) ] || fail "these are too few"
[ "$(counted CR3)" -le $(($(told ctxt) + $(told processes) + 200)) ] || fail "these are too many"

caption "Stop it at a function of its kernel, and let it go on"
hits=$(show kvmictl break --pid "$guest" do_sys_openat2 --count 3) || fail "$hits"
echo "$hits"
[ "$(echo "$hits" | grep -c '^ .* do_sys_openat2[+]0x0/')" = 3 ] || fail "it was not hit three times"
expect_ticks 2

caption "Execute ten instructions, one after the other"
steps=$(show kvmictl step --pid "$guest" 10) || fail "$steps"
echo "$steps"
[ "$(echo "$steps" | grep -c '^0x.*: ')" = 10 ] || fail "these are not ten"
expect_ticks 2
kill "$guest"
wait "$guest"
printf '\nboot passed\n'
