# shellcheck shell=sh disable=SC2034  # not all scripts use all of it
# SPDX-License-Identifier: GPL-2.0 OR MIT
#
# Sourced by scripts that test something in the lab, or in a guest of it, under
# busybox: their results as KTAP.  They print its first and last line themselves.

# What there is up to now: the number of results, and whether one of them was not ok.
count=0 failed=0
leaks=/sys/kernel/debug/kmemleak

# quote FILE…: their ends, as comments.
quote() { tail -q -n 100 "$@" | sed 's/^/# /'; }

# result "ok"|"not ok" NAME [DIRECTIVE]
result() {
	count=$((count + 1))
	echo "$1 $count $2${3:+ # $3}"
	[ "$1" = ok ] || failed=1
}

# check NAME COMMAND…: whether the command succeeds.
check() {
	name=$1
	shift
	if "$@" >/tmp/ktap.log 2>&1; then
		result ok "$name"
	else
		quote /tmp/ktap.log
		result "not ok" "$name"
		return 1
	fi
}

# subtests NAME COMMAND…: its output is KTAP itself and becomes a test with subtests.
subtests() {
	name=$1
	shift
	{ "$@" 2>&1 </dev/null; echo $? >/tmp/ktap.status; } |
		while IFS= read -r line; do echo "  $line"; done
	status=$(cat /tmp/ktap.status)
	case $status in
	0) result ok "$name" ;;
	4) result ok "$name" "SKIP" ;;
	*) result "not ok" "$name" "exit status $status" ;;
	esac
}

# Whether kmemleak has found nothing.  It does not look at objects younger than
# 5 s, and a first scan may err.
no_leaks() {
	sleep 5
	echo scan >$leaks
	echo scan >$leaks
	! grep . $leaks
}
