#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# stress.sh FLAVOUR SECONDS: runs in the lab.  Everything at once, for so long on
# one vCPU and for so long on four, and then tens of thousands of single steps; lab
# run fails on any report of the kernel.

set -u
FLAVOUR=$1
. tools/lab/guest/common.sh

case $FLAVOUR in
debug) scale=5 rounds=10 ;;
*) scale=1 rounds=100 ;;
esac

load_kvm && insmod "$PROVIDER" || exit 1
"$BIN/kvmi_test" --stress "$2" --timeout-scale $scale
status=$?
"$BIN/kvmi_test" --rounds-scale $rounds --timeout-scale 20 \
	--filter access_stress.signals --filter access_stress.vcpus || status=$?
rmmod kvmi_host && unload_kvm || exit 1
exit $status
