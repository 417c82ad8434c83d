#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# demo.sh: runs in the lab.  Starts an ordinary guest under an unmodified QEMU,
# looks into its memory from outside, changes a file of it and lets go.

set -u
FLAVOUR=lab
. tools/lab/guest/common.sh

console=/tmp/console
memory=96M
new="kvmi-demo-marker: rewritten-by-kvmi"

caption() { printf '\n== %s\n' "$*"; }
fail() {
	printf '\ndemo failed: %s\n' "$*"
	exit 1
}

# show COMMAND…: prints and runs it.
show() {
	echo "$ $*"
	"$@" || fail "'$1 $2' ended with status $?"
}

# wait_for SECONDS TEXT: until the guest prints it.
wait_for() {
	for _ in $(seq "$1"); do
		grep -q "$2" $console && return
		kill -0 "$guest" 2>/dev/null || return 1
		sleep 1
	done
	return 1
}

ticks() { grep -c '^tick' $console; }

kvmictl() { "$BIN/kvmictl" "$@"; }

caption "Load KVM and its introspection provider on this host"
show load_kvm
show insmod "$PROVIDER"

caption "Start an ordinary guest: $(qemu-system-x86_64 --version | head -n 1)"
: >$console
qemu-system-x86_64 -name demo -accel kvm -cpu qemu64 -m $memory -display none -nodefaults -no-reboot \
	-serial file:$console -kernel "$KERNEL/bzImage" -initrd build/guest.cpio.gz \
	-append "console=ttyS0 loglevel=4 panic=-1" 2>/tmp/qemu.err &
guest=$!
trap 'kill $guest 2>/dev/null' EXIT
wait_for 60 '^tick 3:' || { cat /tmp/qemu.err $console; fail "the guest does not come up"; }
echo "The guest prints what its file /run/marker says:"
tail -n 2 $console

caption "Which VMs are there, and what is this one?"
show kvmictl list
show kvmictl info --pid $guest

caption "Find the version banner of the guest's kernel in its memory"
show kvmictl find --pid $guest --max 4 'Linux version'
where=$(kvmictl find --pid $guest --max 1 'Linux version')
show kvmictl read --pid $guest "$where" 64 --format text

caption "Stop its vCPUs, look at their registers, let them go on"
show kvmictl regs --pid $guest
show kvmictl pause --pid $guest --for 2
before=$(ticks)
wait_for 10 "^tick $((before + 2)):" || fail "the guest does not go on"
tail -n 1 $console
grep -q lockup $console && fail "the guest noticed: $(grep lockup $console)"

caption "Rewrite the guest's file behind its back"
# Not beyond the memory, where all up to the BIOS below 4 GiB is a hole.
hits=$(show kvmictl find --pid $guest --to $memory 'kvmi-demo-marker: untouched') || fail "$hits"
echo "$hits" | head -n 6
echo "($(echo "$hits" | grep -c ^0x) addresses; a file's data starts on a page, the others are passing copies)"
for gpa in $(echo "$hits" | grep '^0x.*000$'); do
	show kvmictl write --pid $guest "$gpa" --text "$new"
	sleep 2
	grep -q "^tick.*$new" $console && break
done
wait_for 5 "^tick.*$new" || fail "the guest still prints the old text: $(tail -n 1 $console)"
echo "The guest, which wrote nothing itself, now prints:"
tail -n 2 $console

caption "Detached, the guest runs on"
before=$(ticks)
sleep 3
[ "$(ticks)" -gt "$before" ] || fail "the guest has stopped"
tail -n 1 $console
kill $guest
wait $guest
show rmmod kvmi_host
show unload_kvm
printf '\ndemo passed\n'
