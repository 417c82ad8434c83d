#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# kvmmem.sh FLAVOUR [host|'' [OPTION]…]: runs in the lab, with KVM loaded.
# Tests kvmmem.ko in a guest of QEMU, as KTAP; the options are kvmmem_test's, and no
# word of them has a space in it.  With "host", for which kvmi_host is loaded, the
# guest's VM is an introspector, and its pages those of a VM of kvmmem_host;
# without, the host knows nothing of mapping.

set -u
FLAVOUR=$1 host=${2:-}
. tools/lab/guest/common.sh
. tools/lab/guest/ktap.sh

MODULE=build/modules/$FLAVOUR/kvmmem.ko
console=/tmp/kvmmem.console
out=/tmp/kvmmem.out
memory=256M
[ "$FLAVOUR" != debug ] || memory=1024M

# bail REASON: there are no results.
bail() {
	quote /tmp/kvmmem.err $console
	echo "Bail out! $*"
	exit 1
}

: >$console
: >$out
: >/tmp/kvmmem.err
make_initrd /tmp/kvmmem.cpio tools/lab/guest/kvmmem-init tools/lab/guest/ktap.sh \
	"$MODULE" "$BIN/kvmmem_test"

[ $# -lt 2 ] || shift
shift
options="$*"
set -- # the port to the host
if [ -n "$host" ]; then
	socket=/tmp/kvmmem.socket
	rm -f $socket
	"$BIN/kvmmem_host" $socket 2>/tmp/kvmmem.err &
	server=$!
	trap 'kill $server 2>/dev/null' EXIT
	for _ in $(seq 30); do
		[ ! -S $socket ] || break
		kill -0 $server || bail "there is no target"
		sleep 1
	done
	set -- -chardev "socket,id=host,path=$socket" -device virtserialport,chardev=host,name=kvmmem.host
fi
# The default machine's interrupt routing takes the debug kernel too long: see Documentation/lab.md.
qemu-system-x86_64 -name kvmmem -accel kvm -machine q35 -cpu qemu64 -smp 2 -m $memory -display none \
	-nodefaults -no-reboot -serial file:$console -kernel "$KERNEL/bzImage" -initrd /tmp/kvmmem.cpio \
	-device virtio-serial-pci -chardev file,id=out,path=$out \
	-device virtserialport,chardev=out,name=kvmmem.out "$@" \
	-append "console=ttyS0 loglevel=5 panic=-1 oops=panic -- $options" 2>>/tmp/kvmmem.err &
qemu=$!
# The guest takes longer to boot than its VM to be there.
for _ in $(seq 30); do
	[ -n "$host" ] || break
	! "$BIN/kvmictl" introspector --pid $qemu --on >/tmp/kvmmem.introspector 2>&1 || break
	sleep 1
done
wait $qemu || bail "QEMU ended with an error"
grep -q '^1\.\.' $out || bail "the guest went down"
sed '/^1\.\.[0-9]*$/d' $out
count=$(grep -c '^\(not \)\?ok ' $out)
! grep -q '^ *not ok' $out || failed=1
# The lab itself is a machine without KVM below, unless the real machine has one.
if [ -z "$host" ]; then
	if insmod "$MODULE" 2>/tmp/kvmmem.err; then
		rmmod kvmmem
		result ok "load kvmmem without KVM" "SKIP this is a guest of KVM"
	elif grep -q 'No such device' /tmp/kvmmem.err; then
		result ok "load kvmmem without KVM"
	else
		quote /tmp/kvmmem.err
		result "not ok" "load kvmmem without KVM"
	fi
fi
if trouble $console >/tmp/kvmmem.err; then
	quote /tmp/kvmmem.err
	result "not ok" "the guest's kernel logged no report"
else
	result ok "the guest's kernel logged no report"
fi
echo "1..$count"
exit $failed
