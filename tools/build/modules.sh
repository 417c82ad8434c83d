#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# modules.sh KDIR OUT TARGET [VAR=VALUE…]: builds or installs kvmi_host.ko and
# kvmmem.ko for the kernel built in KDIR, in OUT.  With CONFIG_KVMI_HOST= it is
# kvmmem.ko only, for which the kernel of a guest need not have the series.
# Names what is missing before make would fail in the middle of it.

. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/source.sh"
. "$(dirname "$0")/toolchain.sh"

kdir=$1 out=$2 target=$3
shift 3
build_it="build that kernel there first"

[ -f "$kdir/.config" ] || die "$kdir: no configured kernel tree" \
	"KDIR=/path/of/the/build of a patched $KERNEL_LINE kernel, configured and built (see README.md)"
kdir=$(realpath "$kdir")
src=$kdir
[ ! -e "$kdir/source" ] || src=$(realpath "$kdir/source")

# The value of a symbol, without quotes; empty if it is off.
config() { sed -n "s/^CONFIG_$1=//p" "$kdir/.config" | tr -d '"'; }

modules=(kvmi_host kvmmem)
for variable in "$@"; do
	[ "$variable" != CONFIG_KVMI_HOST= ] || modules=(kvmmem)
done
if [ "${modules[0]}" = kvmi_host ]; then
	[ -f "$src/include/linux/kvm_introspection.h" ] ||
		die "$src: the patch series is missing" "apply patches/$KERNEL_LINE in the order of its file 'series', then $build_it"
	[ "$(config KVM_INTROSPECTION)" = y ] ||
		die "$kdir: CONFIG_KVM_INTROSPECTION is off" "turn it on, then $build_it"
fi
[ "$(config RUST)" = y ] ||
	die "$kdir: CONFIG_RUST is off" "'make LLVM=1 rustavailable' there tells what Rust lacks; turn it on, then $build_it"
[ -f "$kdir/Module.symvers" ] ||
	die "$kdir: configured, but not built" "$build_it"
[ -f "$kdir/rust/libkernel.rmeta" ] ||
	die "$kdir: rust/*.rmeta are missing" \
		"a package of kernel headers lacks them: use the folder in which the kernel was built"

build() { make -C "$kdir" M="$ROOT" MO="$ROOT/$out" "${KMAKE_FLAGS[@]}" "$target" "$@"; }

if [ "$target" = modules_install ]; then
	# Needs no compiler, and root's PATH may well have none.
	for module in "${modules[@]}"; do
		[ -f "$out/$module.ko" ] || die "$out/$module.ko: not built" "make modules KDIR=$kdir"
	done
	KMAKE_FLAGS=()
	step "$target from $out" "V=1 shows all" build "$@"
	exit
fi

# The compilers of that kernel: Rust's metadata is of one exact version.
if [ "$(config CC_IS_CLANG)" = y ]; then
	major=$(($(config CLANG_VERSION) / 10000))
	! command -v "clang-$major" "ld.lld-$major" >/dev/null || LLVM=${LLVM:--$major}
fi
wanted=$(config RUSTC_VERSION_TEXT)
for rustc in "${RUSTC:-}" "$(command -v rustc || true)" /usr/bin/rustc; do
	if [ -x "$rustc" ] && [ "$("$rustc" --version)" = "$wanted" ]; then
		RUSTC=$rustc
		break
	fi
done
[ "$("${RUSTC:-false}" --version 2>/dev/null)" = "$wanted" ] ||
	die "no '$wanted', which built that kernel" "pass RUSTC=/path/of/it, or rebuild the kernel with yours"
find_toolchain
[ -n "$BINDGEN" ] || die "no bindgen >= $MIN_BINDGEN" "'make setup', or pass BINDGEN=/path/of/it"
[ -n "$RUSTFMT" ] || die "no working rustfmt, through which bindgen writes" "'make setup', or pass RUSTFMT=/path/of/it"
kernel_make_flags
[ "$(config CC_IS_CLANG)" = y ] || KMAKE_FLAGS=("${KMAKE_FLAGS[@]:2}") # without LLVM and HOSTCC

mkdir -p "$out"
exec 9>"$CACHE/lock"
flock 9
step "$target in $out" "V=1 shows all" build -j"$JOBS" "$@"
[ "$out" != build/modules/kdir ] || [ "$target" != modules ] || printf '  %s\n' "${modules[@]/#/$out/}"
