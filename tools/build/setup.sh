#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Installs what building and testing needs and this machine lacks.

. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/toolchain.sh"

BINDGEN_VERSION=0.72.1

COMMON_PACKAGES=(
	bc bison build-essential busybox-static cpio curl flex isolinux kmod
	libdw-dev libelf-dev libssl-dev patch python3 qemu-system-x86 rsync seabios
	syslinux-common util-linux xorriso xz-utils
)

packages_for() {
	case $1 in
	debian:12)
		say clang-19 lld-19 llvm-19 libclang-19-dev rustc-web rust-web-src rust-web-clippy
		command -v rustfmt >/dev/null || say rustfmt-web
		command -v cargo >/dev/null || say cargo-web
		;;
	debian:*)
		say clang lld llvm libclang-dev rustc rust-src rust-clippy bindgen
		command -v rustfmt >/dev/null || say rustfmt
		command -v cargo >/dev/null || say cargo
		;;
	esac
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo "$@"
	else
		die "this needs root: $*" "run it as root, or install sudo"
	fi
}

apt_install() {
	export DEBIAN_FRONTEND=noninteractive
	as_root apt-get -qq update
	as_root apt-get -qq -y --no-install-recommends install "$@"
}

install_packages() {
	local os=$1 wanted missing=() package
	read -ra wanted <<<"${COMMON_PACKAGES[*]} $(packages_for "$os" | tr '\n' ' ')"
	for package in "${wanted[@]}"; do
		installed "$package" || missing+=("$package")
	done
	[ ${#missing[@]} -ne 0 ] || return 0
	as_root true # asks for a password here rather than behind a progress line
	step "install ${#missing[@]} packages" "see whether this works: apt-get install ${missing[*]}" \
		apt_install "${missing[@]}"
}

# Elsewhere than on Debian: say what is needed rather than guess package names.
require_tools() {
	local tool missing=()
	for tool in bc bison busybox cpio flex ld.lld make patch perl qemu-system-x86_64 rsync xz; do
		command -v "$tool" >/dev/null || missing+=("$tool")
	done
	[ ${#missing[@]} -eq 0 ] || die "missing: ${missing[*]}" \
		"install these, and the headers of libelf, libssl, libdw; see Documentation/lab.md"
}

os=$(. /etc/os-release && say "${ID:-}:${VERSION_ID:-rolling}")
case $os in
debian:1[0-1]) die "Debian ${os#*:} is too old" "use Debian 12 or 13" ;;
debian:*) install_packages "$os" ;;
*) require_tools ;;
esac

find_toolchain
[ -n "$LLVM" ] || die "no clang + lld + llvm of version >= $MIN_LLVM" "install them, or set LLVM=-N"
[ -n "$RUSTC" ] || die "no rustc >= $MIN_RUSTC with the sources of its core library" \
	"install both from the same place, or set RUSTC= and RUST_LIB_SRC="
[ -n "$RUSTFMT" ] || die "no working rustfmt" "install it, or set RUSTFMT="
command -v cargo >/dev/null || die "no cargo" "install it"
if [ -z "$BINDGEN" ]; then
	step "build bindgen $BINDGEN_VERSION" "cargo install bindgen-cli by hand and set BINDGEN=" \
		cargo install --quiet --locked --root "$CACHE/tools" --version "$BINDGEN_VERSION" bindgen-cli
fi
