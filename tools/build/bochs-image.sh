#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Prepares a machine with VMX and EPT that Bochs emulates: in DIR, boot.iso and
# bochsrc, which 'CACHE/bochs/run -f DIR/bochsrc' boots.

. "$(dirname "$0")/common.sh"

USAGE="usage: bochs-image.sh [OPTION]... KERNEL INITRAMFS DIR [KERNEL-ARGUMENT]...
INITRAMFS is a folder, or an uncompressed archive of one.
  -c N      number of CPUs, 1 or 2 (default 1)
  -m MODEL  CPU model, as in '--help cpu' of Bochs (default tigerlake)
  -i IPS    instructions per emulated second (default 100000000)
  -s MB     memory (default 512)
The machine's serial ports go to files in DIR: ttyS0, the console, to serial.log,
ttyS1 to out, ttyS2 to status."

usage() {
	say "$USAGE" >&2
	exit 2
}

cpus=1
model=tigerlake
ips=100000000
memory=512
while getopts c:m:i:s: option; do
	case $option in
	c) cpus=$OPTARG ;;
	m) model=$OPTARG ;;
	i) ips=$OPTARG ;;
	s) memory=$OPTARG ;;
	*) usage ;;
	esac
done
shift $((OPTIND - 1))
[ $# -ge 3 ] || usage
kernel=$1 initramfs=$2
mkdir -p "$3"
dir=$(realpath "$3")
shift 3
[[ $cpus:$ips:$memory =~ ^[12]:[0-9]+:[0-9]+$ && $model =~ ^[a-z0-9_]+$ ]] || usage
[[ ! $dir =~ [^A-Za-z0-9/._+@-] ]] || die "a name that a bochsrc cannot hold: $dir" "use another folder"
[ -f "$CACHE/bochs/version" ] || die "no Bochs in $CACHE" "run tools/build/bochs.sh"
version=$(cat "$CACHE/bochs/version")
for file in /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32; do
	[ -e "$file" ] || die "missing: $file" "'make setup', or install isolinux and syslinux"
done
command -v xorriso >/dev/null || die "missing: xorriso" "'make setup', or install it"

arguments=(
	'console=ttyS0,115200' # without the rate it is 9600 baud, in emulated time
	panic=-1 oops=panic reboot=triple # with reset_on_triple_fault=0: a reboot ends Bochs
	mitigations=off tsc=reliable
	# It counts instructions, whatever CPUID says of the model's hardware.
	tsc_early_khz=$((ips / 1000))
)
[ "$cpus" = 1 ] || arguments+=(idle=halt)
cpu="model=$model, count=$cpus, ips=$ips, reset_on_triple_fault=0, ignore_bad_msrs=1"
# 3.0 wants the descriptor of posted interrupts aligned to a page.
version_ge "$version" 3.1 || arguments+=(kvm-intel.enable_apicv=0)
arguments+=("$@")

iso=$(mktemp -d "$dir/iso.XXXXXX")
trap 'rm -rf "$iso"' EXIT
mkdir "$iso/isolinux"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$iso/isolinux/"
cp "$kernel" "$iso/kernel"
if [ -d "$initramfs" ]; then
	# Not compressed: reading is cheap in the emulator, inflating is not.
	(cd "$initramfs" && find . -print0 | cpio -0 -o -H newc --quiet -R 0:0) >"$iso/initrd"
else
	cp "$initramfs" "$iso/initrd"
fi
cat >"$iso/isolinux/isolinux.cfg" <<-EOF
	DEFAULT kvmi
	PROMPT 0
	LABEL kvmi
	KERNEL /kernel
	APPEND initrd=/initrd ${arguments[*]}
EOF
xorriso -as mkisofs -quiet -o "$dir/boot.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat \
	-no-emul-boot -boot-load-size 4 -boot-info-table "$iso" 2>"$iso/log" ||
	{ cat "$iso/log" >&2; die "cannot make $dir/boot.iso"; }

# Anything but "fatal" and "ignore" writes lines for every VM entry.
cat >"$dir/bochsrc" <<-EOF
	cpu: $cpu
	memory: guest=$memory, host=$memory
	romimage: file=\$BXSHARE/BIOS-bochs-latest, options=fastboot
	vgaromimage: file=\$BXSHARE/VGABIOS-lgpl-latest
	pci: enabled=1, chipset=i440fx
	ata0-master: type=cdrom, path=$dir/boot.iso, status=inserted
	boot: cdrom
	com1: enabled=1, mode=file, dev=$dir/serial.log
	com2: enabled=1, mode=file, dev=$dir/out
	com3: enabled=1, mode=file, dev=$dir/status
	speaker: enabled=0
	display_library: term
	clock: sync=none
	log: $dir/bochs.log
	panic: action=fatal
	error: action=ignore
	info: action=ignore
	debug: action=ignore
EOF
