# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# Sourced after common.sh: finds the tools that build Rust code for the kernel.
# Each variable that the caller has set is taken as it is.

MIN_LLVM=17
MIN_RUSTC=1.85
MIN_BINDGEN=0.71.1

# LLVM as the kernel's Makefile takes it: 1 for plain names, -N for suffixed ones.
find_llvm() {
	local n
	for n in '' -22 -21 -20 -19 -18 -17; do
		command -v "clang$n" "ld.lld$n" "llvm-ar$n" "llvm-config$n" >/dev/null || continue
		version_ge "$(version_of "clang$n" --version)" $MIN_LLVM || continue
		say "${n:-1}"
		return
	done
}

# The distribution's compiler comes first: its sources of the core library are
# a package, while a toolchain manager's may be absent.
find_rustc() {
	local rustc
	for rustc in /usr/bin/rustc "$(command -v rustc || true)"; do
		if [ -x "$rustc" ] && version_ge "$(version_of "$rustc" --version)" $MIN_RUSTC &&
			[ -n "$(find_rust_lib_src "$rustc")" ]; then
			say "$rustc"
			return
		fi
	done
}

find_rust_lib_src() {
	local dir
	for dir in "$("$1" --print sysroot)/lib/rustlib/src/rust/library" \
		"/usr/src/rustc-$(version_of "$1" --version)/library"; do
		[ ! -d "$dir/core" ] || { say "$dir"; return; }
	done
}

find_bindgen() {
	local bindgen
	for bindgen in "$(command -v bindgen || true)" "$CACHE/tools/bin/bindgen"; do
		if [ -x "$bindgen" ] && version_ge "$(version_of "$bindgen" --version)" $MIN_BINDGEN; then
			say "$bindgen"
			return
		fi
	done
}

# bindgen pipes what it generates through rustfmt: without a working one its
# output is silently empty.
find_rustfmt() {
	local rustfmt
	for rustfmt in "$(command -v rustfmt || true)" /usr/bin/rustfmt; do
		if [ -x "$rustfmt" ] && "$rustfmt" --version >/dev/null 2>&1; then
			say "$rustfmt"
			return
		fi
	done
}

# Clippy reads the compiler's own metadata, so it must come with that compiler.
find_clippy_driver() {
	local driver
	driver=$(dirname "$RUSTC")/clippy-driver
	[ ! -x "$driver" ] || say "$driver"
}

find_toolchain() {
	LLVM=${LLVM:-$(find_llvm)}
	RUSTC=${RUSTC:-$(find_rustc)}
	RUST_LIB_SRC=${RUST_LIB_SRC:-${RUSTC:+$(find_rust_lib_src "$RUSTC")}}
	BINDGEN=${BINDGEN:-$(find_bindgen)}
	RUSTFMT=${RUSTFMT:-$(find_rustfmt)}
	CLIPPY_DRIVER=${CLIPPY_DRIVER:-${RUSTC:+$(find_clippy_driver)}}
	suffix=${LLVM#1}
	if [ -n "$LLVM" ]; then
		# libclang is found through the environment only, not through make.
		LIBCLANG_PATH=${LIBCLANG_PATH:-$("llvm-config$suffix" --libdir)}
		export LIBCLANG_PATH
	fi
}

# The kernel's make variables, one per array element.
kernel_make_flags() {
	# shellcheck disable=SC2034  # for those who source this
	KMAKE_FLAGS=(LLVM="$LLVM" HOSTCC="clang$suffix" RUSTC="$RUSTC"
		RUST_LIB_SRC="$RUST_LIB_SRC" BINDGEN="$BINDGEN" RUSTFMT="$RUSTFMT"
		CLIPPY_DRIVER="$CLIPPY_DRIVER")
}

# What a kernel build depends on besides its sources.
toolchain_id() {
	"clang$suffix" --version | head -n 1
	"$RUSTC" --version
	"$BINDGEN" --version
}
