#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# scene.sh FLAVOUR: runs in the lab.  Two ordinary guests under an unmodified QEMU:
# a target, and an introspector in which tools map the target's memory.  Either one
# is killed while it is mapped.

set -u
FLAVOUR=$1
. tools/lab/guest/common.sh
. tools/lab/guest/linux-guest.sh

view=/tmp/introspector.console
cid=3 port=4711
introspector=

caption() { printf '\n== %s\n' "$*"; }
fail() {
	printf '\nscene failed: %s\n' "$*"
	tail -n 5 $console
	echo "introspector:"
	grep -v "^alive" $view | tail -n 80
	cat /tmp/attach
	exit 1
}

# start_introspector [PARAMETER]…: its pid is in $introspector.
start_introspector() {
	: >$view
	make_initrd /tmp/introspector.cpio tools/lab/guest/introspector-init build/modules/lab/kvmmem.ko \
		"$BIN/kvmictl" "$BIN/examples/mapped" /tmp/guest.map
	qemu-system-x86_64 -name introspector -accel kvm -cpu qemu64 -smp 2 -m 160M -display none \
		-nodefaults -no-reboot -serial file:$view -kernel "$guest_kernel/bzImage" \
		-initrd /tmp/introspector.cpio -device vhost-vsock-pci,guest-cid=$cid \
		-append "console=ttyS0 loglevel=5 panic=-1 $*" 2>/tmp/introspector.err &
	introspector=$!
	see 60 '^kvmmem is loaded'
}

# see SECONDS TEXT: until the introspector prints it; on a slow host that may take longer.
see() {
	for _ in $(seq $(($1 * PATIENCE))); do
		grep -q "$2" $view && return
		! grep -q '^mapped: ended with [^0]' $view || break
		kill -0 "$introspector" 2>/dev/null || fail "the introspector ended: $(cat /tmp/introspector.err)"
		sleep 1
	done
	fail "the introspector does not say '$2'"
}

# offer: to the next tool in the introspector, as soon as that listens, until it hangs up.
offer() {
	for _ in $(seq 60); do
		kvmictl attach --pid "$guest" --vsock $cid:$port >/tmp/attach 2>&1 && return
		grep -q 'cannot connect' /tmp/attach || return
		sleep 1
	done
}

# tool NUMBER STATUS: offers the target to that tool, which ends with that status.
tool() {
	offer
	see 60 "^$1: ended with "
	tr -d '\r' <$view | sed -n "/^$1: /,/^$1: ended/p" | tee /tmp/said
	grep -q "^$1: ended with $2\$" /tmp/said || fail "it should end with $2"
}

# expect_peace: the introspector has not noticed anything.
expect_peace() {
	! noticed=$(trouble $view) || fail "the introspector noticed: $noticed"
}

# stay: offers the target to the tool that keeps it mapped.
stay() {
	offer &
	attach=$!
	see 120 '^jiffies_64 is '
	tr -d '\r' <$view | sed -n '/^mapped: begins/,/^jiffies_64 is/p'
}

[ -e /sys/module/kvmi_host ] || { load_kvm && insmod "$PROVIDER"; } || fail "KVM cannot be loaded"
: >$view
: >/tmp/attach

caption "Start a target, and an introspector with a vsock"
start_guest target
trap 'kill $guest $introspector 2>/dev/null' EXIT
start_introspector tour=1
kvmictl list

caption "Only an introspector may map memory of others"
tool 1 1
grep -q 'does not let this VM map' /tmp/said || fail "the reason is not told"
kvmictl introspector --pid "$introspector" --on || fail "it cannot be made one"

caption "In the introspector: find the banner of the target's kernel, and its tasks"
banner=$(kvmictl translate --pid "$guest" --symbols "$map" linux_banner) || fail "$banner"
tool 2 0
grep -qx "$banner" /tmp/said || fail "it is not found at $banner"
tool 3 0
grep -q '^Linux version ' /tmp/said || fail "it is not the banner"
tool 4 0
grep -q '^ *0 .* swapper/0$' /tmp/said || fail "the first task is not there"
grep -q '^ *2 .* kthreadd$' /tmp/said || fail "the third task is not there"

caption "In the introspector: see who changes the target's kernel, and change a file of the target"
tool 5 0
grep -q "$patcher: permitted\$" /tmp/said || fail "the culprit is not named"
tool 6 0
pages=$(grep -c '^0x.*000$' /tmp/said)
[ "$pages" -gt 0 ] || fail "the file is not found"
for nth in $(seq 7 $((6 + pages))); do
	tool "$nth" 0
done
wait_for 20 '^tick.*written-remotely-' || fail "the target does not see what was written"
grep '^tick.*written-remotely-' $console | head -n 1

caption "Each of both sees what the other one writes"
stay
grep -q 'jiffies_64 at .* without any call' $view || fail "jiffies_64 was not seen"
tr -d '\r' <$view | sed -n 's/^jiffies_64 at .* was \([0-9]*\), and is \([0-9]*\) .*/\1 \2/p' >/tmp/ticks
read -r before after </tmp/ticks
[ "$after" -gt "$before" ] || fail "jiffies_64 stands still"
wait_for 20 '^tick.*changed-remotely-' || fail "the target does not see what was written"
grep '^tick.*changed-remotely-' $console | head -n 1

caption "Kill the introspector while it has the target mapped"
expect_peace
kill -9 "$introspector"
wait "$introspector"
wait $attach
cat /tmp/attach
expect_ticks 3
kvmictl read --pid "$guest" 1M 16 || fail "the target cannot be looked into any more"

caption "Kill the target while another introspector has it mapped"
start_introspector
kvmictl introspector --pid "$introspector" --on || fail "it cannot be made one"
stay
kill -9 "$guest"
wait "$guest"
see 30 '^mapped: ended with 0'
grep '^introspection has ended' $view || fail "the tool does not know"
see 10 '^alive for '
wait $attach
cat /tmp/attach
expect_peace
kvmictl introspector --pid "$introspector" || fail "it cannot be asked for"
kill "$introspector"
wait "$introspector"
printf '\nscene passed\n'
