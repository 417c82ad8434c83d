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

# module_arguments MODULE: those that the kernel's command line has for it.
module_arguments() { tr ' ' '\n' </proc/cmdline | sed -n "s/^$1\.//p"; }

# load_module MODULE [ARGUMENT]…
load_module() {
	module=$1
	shift
	# shellcheck disable=SC2046  # one word for each argument
	insmod "$KERNEL/$module.ko" $(module_arguments "$module") "$@"
}

load_kvm() { load_module irqbypass && load_module kvm && load_module "kvm-$VENDOR"; }
unload_kvm() { rmmod "kvm-$VENDOR" kvm irqbypass; }
