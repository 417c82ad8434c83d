#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# kvmmem-fakehost.sh FLAVOUR [OPTION]…: runs in the lab.  Tests kvmmem.ko with a host
# of its own built in, as KTAP; the options are kvmmem_test's.  It takes no guest, so
# that the checks of the debug kernel are for it, too.

set -u
FLAVOUR=$1
shift
. tools/lab/guest/common.sh
. tools/lab/guest/ktap.sh

# Pages that this host has refused to unmap are lost for good.
# shellcheck disable=SC2317  # check calls it
nothing_left() { ! grep -v -e ' 0$' -e '^quarantined ' /sys/kernel/debug/kvmmem/counters; }

echo "KTAP version 1"
check "load kvmmem" insmod "build/modules/$FLAVOUR-fakehost/kvmmem.ko"
subtests "kvmmem_test" "$BIN/kvmmem_test" "$@"
check "nothing is left in kvmmem" nothing_left
check "unload kvmmem" rmmod kvmmem
echo "1..$count"
exit "$failed"
