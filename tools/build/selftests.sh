#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# selftests.sh FLAVOUR: builds KVM's own selftests of the patched tree, as far as
# the lab runs them, into build/selftests.  Follows kernel.sh.

. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/toolchain.sh"

OUT=$ROOT/build/selftests
# They are the same for all flavours: built once.
kernel=$ROOT/build/kernel/lab
[ -e "$kernel" ] || kernel=$ROOT/build/kernel/$1
KDIR=$(realpath "$kernel/kdir")
TREE=$(realpath "$kernel/source")
mapfile -t tests < <(awk '!/^#/ && NF { sub(/,.*/, "", $1); print $1 }' "$ROOT/tools/lab/guest/selftests" | sort -u)

build() {
	mkdir -p "$KDIR/selftests"
	make -C "$KDIR" -s "${KMAKE_FLAGS[@]}" headers
	# Static, to run where only the kernel is ours; with the kernel's own compiler.
	make -C "$TREE/tools/testing/selftests/kvm" -j"$JOBS" ARCH=x86 LLVM="$LLVM" \
		OUTPUT="$KDIR/selftests" KHDR_INCLUDES="-isystem $KDIR/usr/include" \
		USERLDFLAGS=-static "${tests[@]/#/$KDIR/selftests/}"
	mkdir -p "$OUT"
	(cd "$KDIR/selftests" && cp --parents "${tests[@]}" "$OUT")
}

find_toolchain
kernel_make_flags
stamp=$({ cat "$KDIR/kvmi.stamp"; say "${tests[@]}"; } | sha256sum)
[ "$(cat "$OUT/stamp" 2>/dev/null)" = "$stamp" ] && exit
exec 9>"$CACHE/lock"
flock 9
step "build KVM's selftests" "V=1 shows all" build
say "$stamp" >"$OUT/stamp"
