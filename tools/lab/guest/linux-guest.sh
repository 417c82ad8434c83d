# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# Sourced by scripts that look into a live Linux guest under an unmodified QEMU,
# after common.sh.  They have a function fail.
# shellcheck disable=SC2034  # some of it is for one script only

console=/tmp/console
# A guest with the debug kernel would take minutes to boot.
guest_kernel=build/kernel/lab
map=$guest_kernel/System.map
# Of the guest's kernel; there may be more before it is launched.
parameters="console=ttyS0 loglevel=4 panic=-1"
# The kernel's code and constants, for kvmictl guard; two words.
locked="_stext.._etext __start_rodata..__end_rodata"
# How kvmictl guard names who changes that code, with the symbols in /tmp/guest.map.
patcher=' -w- gpa .* orderly_poweroff+0x0/.* by .* patch+.* \[patcher\]'

kvmictl() { "$BIN/kvmictl" "$@"; }

# wait_for SECONDS TEXT: until the guest prints it; on a slow host that may take longer.
wait_for() {
	for _ in $(seq $(($1 * PATIENCE))); do
		grep -q "$2" $console && return
		kill -0 "$guest" 2>/dev/null || return 1
		sleep 1
	done
	return 1
}

ticks() { grep -c '^tick' $console; }

# expect_ticks COUNT: the guest goes on, and has not noticed anything.
expect_ticks() {
	before=$(ticks)
	wait_for 30 "^tick $((before + $1)):" || fail "the guest does not go on"
	! noticed=$(trouble $console) || fail "the guest noticed: $noticed"
}

# launch_guest NAME [OPTION]…: with these options of QEMU's; its pid is in $guest.  It is
# gone when the script ends.
launch_guest() {
	: >$console
	{
		cat build/guest.cpio.gz
		(cd build/modules/lab-guest && echo patcher.ko | cpio -o -H newc --quiet | gzip -1)
	} >/tmp/initrd
	name=$1
	shift
	qemu-system-x86_64 -name "$name" -accel kvm -cpu qemu64 -smp 2 -m 96M -display none -nodefaults \
		-no-reboot -serial file:$console -kernel "$guest_kernel/bzImage" -initrd /tmp/initrd \
		-append "$parameters" "$@" 2>/tmp/qemu.err &
	guest=$!
	trap 'kill $guest 2>/dev/null' EXIT
}

# await_guest: until the guest that was launched has come up.
await_guest() {
	wait_for 60 '^tick 3:' || { cat /tmp/qemu.err $console; fail "the guest does not come up"; }
	# Modules are not in the System.map; their symbols are as the guest prints them.
	{ cat "$map"; tr -d '\r' <$console | sed -n 's/^symbol: //p'; } >/tmp/guest.map
}

# start_guest NAME
start_guest() {
	launch_guest "$1"
	await_guest
}
