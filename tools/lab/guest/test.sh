#!/bin/sh
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# test.sh FLAVOUR [kvmi_test|events|live|short]: all tests that run in the lab, as KTAP; or
# only our own; or only those of what guests do to registers; or only a Linux guest under
# QEMU; or without what takes many minutes.  KVM's own selftests run before our module
# is loaded and with it: they must not see a difference.  On the slow debug flavour they
# run with it only.

set -u
FLAVOUR=$1 only=${2:-}
. tools/lab/guest/common.sh
. tools/lab/guest/ktap.sh

# What checks of the debug flavour cost under emulation: time, hence rounds.
limit=120 too_slow='' pace='' areas='' skip=''
# filters AREA…: options for these.
filters() { printf -- '--filter %s ' "$@"; }
case $FLAVOUR-$VENDOR in
debug-intel)
	# What depends on the vendor; all the rest has run on AMD's machine.
	limit=600 pace="--rounds-scale 0.02 --timeout-scale 5"
	areas=$(filters access. access_ address. event_ hotplug. inject. pause. registers. state. xsave.)
	;;
debug-*) limit=600 too_slow=set_memory_region_test pace="--rounds-scale 0.05 --timeout-scale 5" ;;
*-intel)
	pace="--rounds-scale 0.05"
	# Documentation/bochs.md, "Where it differs from the manual"
	[ "$(nproc)" -eq 1 ] || skip="event_corpus=Bochs forgets the RIP after an exception if it has several CPUs"
	;;
esac

# selftest WHERE NAME[,ARG…] EXPECTED [REASON…]
selftest() {
	where=$1 name=${2%%,*} expected=$3 IFS=,
	# shellcheck disable=SC2086  # the arguments are comma-separated words
	set -- ${2#"$name"}
	unset IFS
	[ $# -eq 0 ] || shift # the empty word before the first comma
	start=$(cut -d . -f 1 /proc/uptime)
	timeout -k 5 $limit "build/selftests/$name" "$@" >/tmp/log 2>&1 </dev/null
	case $? in
	0) got=pass ;;
	4) got=skip ;;
	*) got=fail ;;
	esac
	note="$where, $(($(cut -d . -f 1 /proc/uptime) - start)) s"
	if [ $got != "$expected" ]; then
		quote /tmp/log
		result "not ok" "$name ($note): $got, expected $expected"
	elif [ $got = skip ]; then
		result ok "$name ($note)" "SKIP as on an unpatched kernel"
	elif [ $got = fail ]; then
		result ok "$name ($note)" "fails as on an unpatched kernel"
	else
		result ok "$name ($note)"
	fi
}

selftests() {
	[ "$only" != kvmi_test ] || return
	while read -r name amd intel _; do
		[ $VENDOR = amd ] && expected=$amd || expected=$intel
		case $name:$expected in
		:* | \#*) ;;
		*:-) ;; # not run on this vendor's machine
		"$too_slow":*) result ok "$name" "SKIP takes minutes on this flavour" ;;
		*) selftest "$1" "$name" "$expected" ;;
		esac
	done <tools/lab/guest/selftests
}

# provider_test NAME [OPTION]…
provider_test() {
	name=$1
	shift
	limited "$name" "$BIN/kvmi_test" "$@"
}

# limited NAME COMMAND…: subtests that end.
limited() {
	name=$1
	shift
	subtests "$name" timeout -k 5 $((limit * 15)) "$@"
}

# again NAME ARGUMENT: what depends on paging, with KVM's vendor module loaded anew.
again() {
	if check "load KVM with $2" load_vendor_module "$2"; then
		# shellcheck disable=SC2086  # $pace is several words, or none
		provider_test "kvmi_test, $1" $pace --filter access --filter event_cr --filter event_step
	fi
}

# tuned PARAMETER TEST: the module with a parameter, which the test finds in its environment.
tuned() {
	check "load kvmi_host with $1" insmod "$PROVIDER" "$1" || return
	# shellcheck disable=SC2086  # $pace is several words, or none
	limited "kvmi_test, $1" env "$1" "$BIN/kvmi_test" $pace --filter "$2"
	check "unload kvmi_host with $1" rmmod kvmi_host
}

# Tests swap their memory out.  It is swapped to a RAM disk.
swap_on() { mkswap /dev/ram0 && swapon /dev/ram0; }

map_other_guests() {
	limited "kvmmem in an introspector" sh tools/lab/guest/kvmmem.sh "$FLAVOUR" host
	check "introspector guest that maps another guest" sh tools/lab/guest/scene.sh "$FLAVOUR"
}

load_vendor_module() {
	rmmod kvmi_host && rmmod "kvm-$VENDOR" && load_module "kvm-$VENDOR" "$1" && insmod "$PROVIDER"
}

echo "KTAP version 1"
check "load KVM ($VENDOR)" load_kvm
case $only in
events | live)
	check "load kvmi_host" insmod "$PROVIDER"
	if [ "$only" = live ]; then
		check "live guest whose boot is traced" sh tools/lab/guest/boot.sh "$FLAVOUR"
	else
		# shellcheck disable=SC2046  # these are several words
		provider_test kvmi_test --rounds-scale 0.05 \
			$(filters event_cr event_msr event_xsetbv event_descriptor event_hypercall event_breakpoint)
	fi
	check "unload kvmi_host" rmmod kvmi_host
	echo "1..$count"
	exit
	;;
esac
[ "$FLAVOUR" = debug ] || selftests "without kvmi_host"
check "switch swap on" swap_on
if check "load kvmi_host" insmod "$PROVIDER"; then
	# shellcheck disable=SC2086  # these are several words, or none
	provider_test kvmi_test $pace $areas ${skip:+--skip "$skip"}
	selftests "with kvmi_host"
	# These take a QEMU on the host, and patience on a debug kernel.
	case $FLAVOUR-$VENDOR-$only in
	lab-amd-*)
		check "live guest with a locked kernel" sh tools/lab/guest/live.sh "$FLAVOUR"
		check "live guest whose boot is traced" sh tools/lab/guest/boot.sh "$FLAVOUR"
		limited "kvmmem in a guest" sh tools/lab/guest/kvmmem.sh "$FLAVOUR"
		map_other_guests
		;;
	debug-amd-) map_other_guests ;;
	esac
	case $VENDOR in
	amd) again "shadow paging" npt=0 ;;
	intel)
		again "shadow paging" ept=0
		again "EPT without A/D bits" eptad=0
		;;
	esac
	# The addresses of a module's code have names only as long as it is loaded.
	[ ! -w "$leaks" ] || check "no memory leaked" no_leaks
	check "unload kvmi_host" rmmod kvmi_host
	tuned event_timeout_ms=700 time_limit.default
	tuned hypercall_rate=5 event_hypercall.calls_of_user_space
	tuned hypercall_user=0 event_hypercall.user_space_may_not
fi
check "switch swap off" swapoff /dev/ram0
check "unload KVM" unload_kvm
case $FLAVOUR-$VENDOR in
debug-amd) rounds=20 ;;
*) rounds=200 ;;
esac
[ $VENDOR != amd ] ||
	limited "kvmmem with a host built in" sh tools/lab/guest/kvmmem-fakehost.sh "$FLAVOUR" --rounds $rounds
echo "1..$count"
