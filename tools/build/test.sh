#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# test.sh FLAVOUR [VENDOR]: all tests in the emulated host of that vendor, amd
# or intel, or in both; with SHORT without what takes many minutes on AMD's debug
# kernel.  The last line sums up everything.

. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/parts.sh"

cd "$ROOT"
LAB=tools/target/x86_64-unknown-linux-gnu/release/lab
flavour=$1 vendor=${2:-all}
patience=4200 # seconds, for all tests in one host

# in_host NAME OPTION… -- ARGUMENT…: guest/test.sh with these arguments.
in_host() {
	local name=$1 options=()
	shift
	while [ "$1" != -- ]; do
		options+=("$1")
		shift
	done
	shift
	part "$LAB" run --flavour "$flavour" --name "$name" --ktap --timeout "$patience" "${options[@]}" -- \
		sh tools/lab/guest/test.sh "$flavour" "$@"
}

# QEMU's TCG has no #BP intercept and no XSAVE; Bochs cannot be stepped nor boot guests.
test_amd() {
	in_host test -- ${SHORT:+short}
	[ "$flavour" = debug ] ||
		in_host test-amd-bochs --machine bochs --model ryzen --append kvm-amd.nrips=0 -- events
}

# guest_files: what a host under Bochs needs to run a Linux guest with QEMU, one a line.
guest_files() {
	local qemu
	qemu=$(command -v qemu-system-x86_64)
	echo "$qemu"
	ldd "$qemu" | grep -o '/[^ ]*'
	printf '%s\n' /usr/share/seabios/bios-256k.bin /usr/share/qemu/{kvmvapic,linuxboot_dma}.bin \
		build/guest.cpio.gz build/modules/lab-guest/patcher.ko build/kernel/lab/{bzImage,System.map}
}

# Two CPUs make races possible, one makes vCPUs take turns; KVM's own selftests
# would tell nothing more on two.  They need another model than the default.
# The debug kernel takes minutes for its boot alone, and is silent for long.
test_intel() {
	if [ "$flavour" = debug ]; then
		patience=9000
		in_host test-intel --machine bochs --stall 600 --append pci=off -- kvmi_test
		return
	fi
	in_host test-intel --machine bochs --model corei7_skylake_x --
	in_host test-intel-smp --machine bochs --cpus 2 -- kvmi_test
	guest_files >build/guest-files
	in_host test-intel-live --machine bochs --memory 1024 --files build/guest-files -- live
}

case $vendor in
amd | intel) "test_$vendor" ;;
all) test_amd; test_intel ;;
*) die "unknown vendor: $vendor" "VENDOR=amd, VENDOR=intel, or none for both" ;;
esac
close_parts
