#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# bench.sh FLAVOUR UNIT: runs in the lab.  Measures what this kernel can do and
# prints the figures, one per line.

set -eu
FLAVOUR=$1 unit=$2
. tools/lab/guest/common.sh

measure() { /tmp/kvmi_bench measure --unit "$unit" --setting "$1"; }

# What is measured does not read the machine's file system.
cp "$BIN/kvmi_bench" /tmp/
load_kvm
# A vCPU that halts would spin for a while.
echo 0 >/sys/module/kvm/parameters/halt_poll_ns
if [ "$FLAVOUR" = stock ]; then
	measure stock
else
	measure unloaded
	insmod "$PROVIDER"
	measure loaded
	# Before others leave memory in reserve.
	[ "$unit" != instructions ] || /tmp/kvmi_bench memory
	measure hooked
fi
