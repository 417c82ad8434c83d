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

# How much more time than the lab's kernel the host's takes for everything.
PATIENCE=1
[ "$FLAVOUR" != debug ] || PATIENCE=5

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

# make_initrd FILE INIT OTHER…: of a guest, with busybox, INIT, and the others beside it.
make_initrd() {
	initrd=$1 init=$2
	shift 2
	dir=$(mktemp -d)
	mkdir "$dir/bin" "$dir/dev" "$dir/proc" "$dir/sys" "$dir/tmp"
	cp "$(command -v busybox)" "$dir/bin/busybox"
	cp "$@" "$dir/"
	cp "$init" "$dir/init"
	chmod 755 "$dir" "$dir/init"
	(cd "$dir" && find . | cpio -o -H newc --quiet) >"$initrd"
	rm -r "$dir"
}

# trouble CONSOLE: prints what the kernel of a guest has reported there; fails if that is nothing.
trouble() { grep -aE 'BUG:|WARNING:|Oops|lockup|stall|possible .* detected|INFO: task' "$1"; }
