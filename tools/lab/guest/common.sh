# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# Sourced by the scripts that run in the lab: its builds, its modules.
# shellcheck disable=SC2034  # some of it is for one script only

KERNEL=build/kernel/$FLAVOUR
PROVIDER=build/modules/$FLAVOUR/kvmi_host.ko
BIN=tools/target/x86_64-unknown-linux-gnu/release

if grep -qw svm /proc/cpuinfo; then
	VENDOR=amd
else
	VENDOR=intel
fi

load_kvm() { insmod "$KERNEL/irqbypass.ko" && insmod "$KERNEL/kvm.ko" && insmod "$KERNEL/kvm-$VENDOR.ko"; }
unload_kvm() { rmmod "kvm-$VENDOR" kvm irqbypass; }
