#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Makes a Bochs that emulates VMX with EPT available as build/bochs/run, a link
# into the cache, which takes Bochs' own arguments.
#
# An installed Bochs is used when it will do.  Otherwise one of Debian's is
# unpacked there, with the libraries it needs, and nothing of it is installed.

. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/source.sh"

MIN_BOCHS=3.0
# The first suite whose Bochs will do.  Newest last: 3.1 in sid, miscompiled it seems,
# divides wrongly, which breaks the kernel's scheduler.
SUITES=(trixie forky sid)
# Of the displays, the only one that neither takes a window nor listens on the network.
PACKAGES=(bochs bochs-term bochsbios vgabios)
BY_HAND="install Bochs >= $MIN_BOCHS with its BIOS images so that 'bochs' is in PATH, or leave Intel out: VENDOR=amd"

DIR=$CACHE/bochs
BIOS=(BIOS-bochs-latest VGABIOS-lgpl-latest)

# bochs_version CMD…: the version that this Bochs says it has.
bochs_version() { "$@" --help 2>&1 </dev/null | sed -n 's/.*Bochs x86 Emulator \([0-9.]*\).*/\1/p' | tail -n 1; }

version_will_do() { [ -n "$1" ] && version_ge "$1" $MIN_BOCHS; }

# --- An installed Bochs ----------------------------------------------------

# Its folder of BIOS images, if it is new enough and has them.
installed_share() {
	local bochs version share
	bochs=$(command -v bochs) || return 0
	version=$(bochs_version "$bochs")
	version_will_do "$version" || return 0
	share=$(realpath "$(dirname "$bochs")/../share/bochs")
	[ ! -e "$share/${BIOS[0]}" ] || [ ! -e "$share/${BIOS[1]}" ] || say "$share"
}

# --- Debian's --------------------------------------------------------------

# Fills a folder with the packages and all that they depend on.
download() (
	rm -rf "$1/apt" # another suite's packages
	# An apt state of its own, in which nothing counts as installed.
	CACHE=$1 SOURCE_SUITES=$2 OWN_SOURCE=$BY_HAND private_apt
	: >"$1/apt/status"
	say "Dir::State::status \"$1/apt/status\";" >>"$APT_CONFIG"
	apt-get -q update
	apt-get -q -y --no-install-recommends --download-only install "${PACKAGES[@]}"
)

# fill FROM TO: the emulator, its plugins and BIOS images, and the libraries of
# these; a tenth of what the packages hold.
fill() {
	local deb object lib=$1/root/usr/lib/x86_64-linux-gnu
	mkdir -p "$1/root" "$2/lib" "$2/plugins" "$2/share"
	for deb in "$1"/apt/cache/archives/*.deb; do
		dpkg-deb --fsys-tarfile "$deb" | tar -x --no-same-owner -C "$1/root"
	done
	cp "$1/root/usr/bin/bochs-bin" "$2/"
	cp -P "$lib"/bochs/plugins/*.so* "$2/plugins/"
	cp -L "${BIOS[@]/#/$1/root/usr/share/bochs/}" "$2/share/"
	for object in "$2/bochs-bin" "$2"/plugins/*.so; do
		"$lib/ld-linux-x86-64.so.2" --library-path "$lib:$lib/pulseaudio" --list "$object"
	done | sed -n 's/.*=> \(.*\) (0x.*/\1/p' | sort -u | xargs cp -L -t "$2/lib"
	cp "$lib/ld-linux-x86-64.so.2" "$2/lib/"
}

# --- The launcher ----------------------------------------------------------

# Builds with the debugger stop at its prompt: the command file makes them go
# on, and with no standard input they end rather than wait at a later prompt.
write_launcher() {
	local share=$1
	say c >"$DIR/continue"
	{
		cat <<-'EOF'
			#!/bin/sh
			# Written by tools/build/bochs.sh.
			here=$(dirname "$(realpath "$0")")
			set -- -q -rc "$here/continue" "$@"
		EOF
		if [ -n "$share" ]; then
			say "export BXSHARE='$share'"
			say "exec '$(command -v bochs)' \"\$@\" </dev/null"
		else
			cat <<-'EOF'
				export BXSHARE="$here/tree/share" LTDL_LIBRARY_PATH="$here/tree/plugins"
				exec "$here/tree/lib/ld-linux-x86-64.so.2" --library-path "$here/tree/lib" \
					"$here/tree/bochs-bin" "$@" </dev/null
			EOF
		fi
	} >"$DIR/run.new"
	chmod +x "$DIR/run.new"
	mv "$DIR/run.new" "$DIR/run"
}

# --- Whether it will do ----------------------------------------------------

# A boot sector that enters 64-bit mode, divides, and says "right" or "wrong".
check_source() {
	cat <<-'EOF'
		.code16
			cli
			cld
			xor %ax, %ax
			mov %ax, %ds
			mov %ax, %es
			# Identity map of the first 2 MB.
			mov $0x1000, %edi
			mov %edi, %cr3
			mov $0xc00, %ecx
			xor %eax, %eax
			rep stosl
			movl $0x2003, 0x1000
			movl $0x3003, 0x2000
			movl $0x83, 0x3000
			mov $0x20, %eax
			mov %eax, %cr4
			mov $0xc0000080, %ecx
			mov $0x100, %eax
			xor %edx, %edx
			wrmsr
			lgdt gdt
			mov $0x80000001, %eax
			mov %eax, %cr0
			ljmp $8, $long
		.code64
		long:
			lea cases, %rsi
			lea right, %rdi
		next:
			mov (%rsi), %rax
			cqo
			idivq 8(%rsi)
			cmp 16(%rsi), %rax
			jne differs
			cmp 24(%rsi), %rdx
			jne differs
			add $32, %rsi
			cmp $end, %rsi
			jne next
			jmp print
		differs:
			lea wrong, %rdi
		print:
			mov (%rdi), %al
			out %al, $0xe9
			inc %rdi
			test %al, %al
			jne print
			mov $0x8900, %dx
			lea shutdown, %rsi
			mov $8, %ecx
			rep outsb
			hlt
		.macro divide a, b
			.quad \a, \b, (\a) / (\b), (\a) % (\b)
		.endm
		cases:
			divide 1000000000, 1
			divide 123456789012345, 1000003
			divide -123456789012345, 1000003
			divide 123456789012345, -1000003
			divide -7205759403792793, -3
		end:
		# The first descriptor is not used: it holds the table's place and size.
		gdt:	.word 15
			.long gdt
			.word 0
			.quad 0x00209a0000000000
		right:	.asciz "\nright\n"
		wrong:	.asciz "\nwrong\n"
		shutdown: .ascii "Shutdown"
			.org 510
			.word 0xaa55
	EOF
}

# It may run to its end or be stopped; only its word counts.
divides() {
	local dir=$DIR/work/check
	rm -rf "$dir"
	mkdir -p "$dir"
	if ! check_source | as --64 -o "$dir/check.o" - ||
		! ld -m elf_x86_64 --oformat binary -Ttext 0x7c00 -e 0x7c00 -o "$dir/floppy" "$dir/check.o"; then
		say "this takes as and ld of x86-64"
		return 1
	fi
	truncate -s 1440K "$dir/floppy"
	cat >"$dir/bochsrc" <<-EOF
		cpu: model=tigerlake, ips=100000000
		memory: guest=32, host=32
		romimage: file=\$BXSHARE/BIOS-bochs-latest, options=fastboot
		vgaromimage: file=\$BXSHARE/VGABIOS-lgpl-latest
		floppya: 1_44=$dir/floppy, status=inserted
		boot: floppy
		display_library: term
		port_e9_hack: enabled=1
		log: $dir/log
		panic: action=fatal
	EOF
	timeout -k 1 30 "$DIR/run" -f "$dir/bochsrc" >"$dir/out" 2>&1 || true
	grep -aq '^right' "$dir/out"
}

# will_do: whether the launcher starts a Bochs that is new enough and divides.
will_do() {
	local version
	version=$(bochs_version "$DIR/run")
	say "Bochs ${version:-does not start}"
	version_will_do "$version" || return 1
	divides || { say "it fails at 64-bit division"; return 1; }
	say "$version" >"$DIR/version"
}

provide() {
	local share suite
	rm -rf "$DIR/stamp" "$DIR/work"
	share=$(installed_share)
	if [ -n "$share" ]; then
		write_launcher "$share"
		! will_do || { finish; return; }
	fi
	if [ "$(uname -m)" != x86_64 ] || ! command -v dpkg-deb >/dev/null; then
		say "Debian's packages are of use on Debian and x86-64 only"
		return 1
	fi
	write_launcher ''
	for suite in "${SUITES[@]}"; do
		rm -rf "$DIR/work" "$DIR/tree"
		mkdir -p "$DIR/work"
		if download "$DIR/work" "$suite" && fill "$DIR/work" "$DIR/tree" && will_do; then
			finish
			return
		fi
	done
	return 1
}

finish() {
	rm -rf "$DIR/work"
	stamp >"$DIR/stamp"
}

# Looks at files only, so that a second run takes no time.
stamp() {
	sha256sum <"$0"
	! command -v bochs || stat -L -c '%s %Y' "$(command -v bochs)"
}

mkdir -p "$DIR"
exec 9>"$DIR/lock"
flock 9
if [ "$(cat "$DIR/stamp" 2>/dev/null)" != "$(stamp)" ]; then
	step "provide Bochs >= $MIN_BOCHS" "$BY_HAND" provide
fi
ln -sfn "$DIR" "$ROOT/build/bochs"
