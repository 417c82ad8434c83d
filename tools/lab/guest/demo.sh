#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# demo.sh: runs in the lab.  Starts an ordinary guest under an unmodified QEMU,
# looks into its memory and at its vCPUs from outside, changes a file of it, locks
# its kernel's code and lets go.  Then has one guest look into another one (scene.sh),
# and traces the boot of a guest (boot.sh).

set -u
FLAVOUR=lab
. tools/lab/guest/common.sh
. tools/lab/guest/linux-guest.sh

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

# said LINES: what the guest has last printed of its file.
said() { grep '^tick' $console | tail -n "$1"; }

# The guest's own time, in seconds.
uptime() { sed -n 's/^tick .* up \([0-9]*\) s\r*$/\1/p' $console | tail -n 1; }

# look: pauses the guest and leaves in $places where its vCPUs are.
look() {
	places=$(kvmictl pause --pid $guest --symbols "$map" --for "$1") || fail "$places"
}

# A line "vCPU N: RIP SYMBOL+OFFSET/SIZE" has to be right by the symbols of the
# kernel that the guest has booted.  All of that kernel is in the last 2 GiB: the
# lower halves of the addresses will do, which a shell can add.
check_place() {
	rip=$3 offset=${4#*+}
	address=$(awk -v symbol="${4%%+*}" '$3 == symbol { print $1 }' "$map")
	[ "$(printf '%s\n' "$address" | wc -w)" = 1 ] || return 0 # several of this name
	[ $((0x${address#ffffffff} + ${offset%/*})) = $((0x${rip#0xffffffff})) ] ||
		fail "$rip is not $4"
	checked=$((checked + 1))
}

caption "Load KVM and its introspection provider on this host"
show load_kvm
show insmod "$PROVIDER"

caption "Start an ordinary guest: $(qemu-system-x86_64 --version | head -n 1)"
start_guest demo
echo "The guest prints what its file /run/marker says:"
said 2

caption "Which VMs are there, and what is this one?"
show kvmictl list
show kvmictl info --pid $guest

caption "Find the version banner of the guest's kernel in its memory"
show kvmictl find --pid $guest --max 4 'Linux version'
where=$(kvmictl find --pid $guest --max 1 'Linux version')
show kvmictl read --pid $guest "$where" 64 --format text

caption "Stop its vCPUs, look at their registers, let them go on"
echo "(kvmictl reads the names of the guest's kernel from KVMI_SYMBOLS=$map)"
export KVMI_SYMBOLS="$map"
show kvmictl regs --pid $guest --msr LSTAR
before_pause=$(uptime)
echo "$ kvmictl pause --pid $guest --for 2"
look 2
echo "$places"
[ "$(echo "$places" | grep -c '^vCPU [01]: 0x')" = 2 ] || fail "there should be two vCPUs"
# In user space a vCPU has no place in the kernel: look again until one has, and a few times more.
checked=0
for _ in $(seq 30); do
	echo "$places" | grep '^vCPU .*+0x' >/tmp/places
	while read -r line; do
		# shellcheck disable=SC2086  # split into words
		check_place $line
	done </tmp/places
	[ $checked -lt 5 ] || break
	look 0
done
[ $checked -ge 5 ] || fail "no vCPU was ever seen in the kernel"
echo "(symbols of $checked places were right)"
show kvmictl top --pid $guest --interval 0.2 --count 3

caption "Translate where a vCPU is, and a symbol; read what is there"
show kvmictl translate --pid $guest "$rip"
banner=$(show kvmictl translate --pid $guest linux_banner) || fail "$banner"
echo "$banner"
show kvmictl read --pid $guest --virtual linux_banner 64 --format text
read_back=$(kvmictl read --pid $guest "$(echo "$banner" | tail -n 1)" 13 --format text)
[ "$read_back" = "Linux version" ] || fail "instead of the banner there is '$read_back'"
# Two names changed places, as in the symbols of another build.
sed 's/ schedule$/&_timeout/; t; s/ schedule_timeout$/ schedule/' "$map" >/tmp/other.map
! refusal=$(kvmictl regs --pid $guest --symbols /tmp/other.map 2>&1) ||
	fail "the symbols of another build were taken"
echo "With the symbols of another build:"
echo "$refusal"

expect_ticks 2
[ "$(uptime)" -gt "$before_pause" ] || fail "the guest's clock stands still at $before_pause s"
said 1

caption "Rewrite the guest's file behind its back"
hits=$(show kvmictl find --pid $guest 'kvmi-demo-marker: untouched') || fail "$hits"
echo "$hits" | head -n 6
echo "($(echo "$hits" | grep -c ^0x) addresses; a file's data starts on a page, the others are passing copies)"
for gpa in $(echo "$hits" | grep '^0x.*000$'); do
	show kvmictl write --pid $guest "$gpa" --text "$new"
	sleep 2
	grep -q "^tick.*$new" $console && break
done
wait_for 5 "^tick.*$new" || fail "the guest still prints the old text: $(said 1)"
echo "The guest, which wrote nothing itself, now prints:"
said 2

caption "Lock the kernel's code and constants: who writes there?"
echo "Once per second a module in the guest changes the kernel's code, as a rootkit would:"
grep '^kernel text' $console | tail -n 1
export KVMI_SYMBOLS=/tmp/guest.map
# shellcheck disable=SC2086  # two words
watched=$(show kvmictl guard --pid $guest $locked --count 4) || fail "$watched"
echo "$watched"
echo "$watched" | grep -q "$patcher: permitted\$" ||
	fail "the culprit is not named"

echo "Writes to other memory can be watched, too, down to the byte:"
watched=$(show kvmictl watch --pid $guest jiffies_64 --count 3) || fail "$watched"
echo "$watched"
[ "$(echo "$watched" | grep -c ' by .* tick_do_update_jiffies64+.*: permitted$')" = 3 ] ||
	fail "others change the guest's time"

caption "Lock them and do not let the guest write"
# shellcheck disable=SC2086  # two words
echo "$ kvmictl guard --pid $guest $locked --block --for 8"
# shellcheck disable=SC2086  # two words
kvmictl guard --pid $guest $locked --block --for 8 >/tmp/guard 2>&1 &
guard=$!
for _ in $(seq 30); do
	! grep -q blocking /tmp/guard || break
	sleep 1
done
echo "$ kvmictl access --pid $guest"
restricted=$(kvmictl access --pid $guest) || fail "$restricted"
lines=$(wc -l <$console)
wait $guard || fail "$(cat /tmp/guard)"
echo "$restricted"
cat /tmp/guard
echo "$restricted" | grep -q 'r-x$' || fail "no page is restricted"
grep -q 'patch+.*: blocked, skipped$' /tmp/guard || fail "nothing was blocked"
echo "Meanwhile the guest has printed:"
tail -n +"$((lines + 1))" $console >/tmp/meanwhile
head -n 4 /tmp/meanwhile
grep -q '^kernel text: as built' /tmp/meanwhile || fail "the kernel's code was changed"
expect_ticks 3
echo "And afterwards:"
tail -n 2 $console
grep '^kernel text' $console | tail -n 1 | grep -q changed || fail "the guest is still locked"

caption "Detached, the guest runs on"
expect_ticks 1
said 1
kill $guest
wait $guest
unset KVMI_SYMBOLS
sh tools/lab/guest/scene.sh $FLAVOUR || fail "one guest does not look into another one"
sh tools/lab/guest/boot.sh $FLAVOUR || fail "the guest's boot was not traced"
show rmmod kvmi_host
show unload_kvm
printf '\ndemo passed\n'
