#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Packs the initramfs of the guest that the demo and the tests start in the lab.

. "$(dirname "$0")/common.sh"

OUT=$ROOT/build/guest.cpio.gz
INIT=$ROOT/tools/lab/guest/vm-init
BUSYBOX=$(command -v busybox)

pack() {
	local dir
	dir=$(mktemp -d "$ROOT/build/guest.XXXXXX")
	mkdir "$dir/bin" "$dir/dev" "$dir/proc" "$dir/run" "$dir/sys"
	cp "$BUSYBOX" "$dir/bin/busybox"
	install -m 755 "$INIT" "$dir/init"
	(cd "$dir" && find . | cpio -o -H newc --quiet | gzip -1) >"$OUT.new"
	mv "$OUT.new" "$OUT"
	rm -r "$dir"
}

[ "$OUT" -nt "$INIT" ] && [ "$OUT" -nt "$BUSYBOX" ] && exit
step "pack the guest" "busybox must be a static binary (package busybox-static)" pack
