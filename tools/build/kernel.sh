#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# kernel.sh FLAVOUR: builds the kernel of that flavour in the cache and leaves
# what the lab boots in build/kernel/FLAVOUR.  All but "stock" have the series.

. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/toolchain.sh"
. "$(dirname "$0")/source.sh"

flavour=$1 variant=
fragments=("$ROOT/configs/lab.config")
case $flavour in
lab) ;;
debug) fragments+=("$ROOT/configs/debug.config") ;;
stock)
	fragments+=("$ROOT/configs/stock.config")
	SERIES_DIR=$ROOT/patches/stock variant=-unpatched
	;;
*) die "unknown flavour: $flavour" "FLAVOUR=lab, FLAVOUR=debug or FLAVOUR=stock" ;;
esac
OUT=$ROOT/build/kernel/$flavour
ARTIFACTS=(arch/x86/boot/bzImage System.map virt/lib/irqbypass.ko
	arch/x86/kvm/kvm.ko arch/x86/kvm/kvm-amd.ko arch/x86/kvm/kvm-intel.ko)

kmake() { make -C "$TREE" O="$O" "${KMAKE_FLAGS[@]}" "$@"; }

stamp() {
	{
		say "$SOURCE_ID"
		series "$SERIES_DIR/series" | while read -r patch; do cat "$SERIES_DIR/$patch"; done
		cat "${fragments[@]}"
		toolchain_id
	} | sha256sum
}

configure() {
	cat "${fragments[@]}" >"$O/kvmi.config"
	kmake KCONFIG_ALLCONFIG="$O/kvmi.config" allnoconfig
	# Kconfig drops silently what lacks a dependency.  The last word on a symbol counts.
	awk -F = '/^CONFIG_/ { want[$1] = $0 } END { for (s in want) if (want[s] !~ /=n$/) print want[s] }' "$O/kvmi.config" |
		grep -vxFf "$O/.config" >"$O/kvmi.config.lost" || return 0
	say "not in the configuration: $(tr '\n' ' ' <"$O/kvmi.config.lost")"
	return 1
}

exec 9>"$CACHE/lock"
flock -n 9 || { say "  waiting for another build in $CACHE"; flock 9; }

prepare_source "$variant"
O=$TREE.$flavour
if [ "$SOURCE_ID" = own ]; then
	[ -z "$variant" ] || die "$KERNEL_SRC has the patch series" "KERNEL_SRC=/path/of/a/tree without it"
	O=$CACHE/own.$flavour
fi
find_toolchain
kernel_make_flags
mkdir -p "$O" "$OUT"

stamp=$(stamp)
if [ "$SOURCE_ID" = own ] || [ "$(cat "$O/kvmi.stamp" 2>/dev/null)" != "$stamp" ]; then
	rm -f "$O/kvmi.stamp"
	step "configure the $flavour kernel" "see configs/ and the fragment's dependencies" configure
	step "build the $flavour kernel" "V=1 shows all; 'make distclean' starts afresh" \
		kmake -j"$JOBS" bzImage modules
	say "$stamp" >"$O/kvmi.stamp"
fi
# A copy: another checkout may rebuild the cache's tree while a lab runs here.
for artifact in "${ARTIFACTS[@]}"; do
	cmp -s "$O/$artifact" "$OUT/${artifact##*/}" || cp "$O/$artifact" "$OUT/"
done
ln -sfn "$O" "$OUT/kdir"
ln -sfn "$TREE" "$OUT/source"
