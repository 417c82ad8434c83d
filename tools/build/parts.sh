# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# Sourced by what consists of several runs that each close with their sums: runs
# them one after the other and closes with the sums of all.

total=(0 0 0)
parts_status=0
parts_log=$(mktemp)
trap 'rm -f "$parts_log"' EXIT

# part COMMAND…: its last line of the form "N passed, N failed, N skipped" counts.
# With DEADLINE, a value of SECONDS, it is ended then.
part() {
	local sums i rc=0 start=$SECONDS limit=()
	[ -z "${DEADLINE:-}" ] || limit=(timeout --kill-after=20 $((DEADLINE - SECONDS)))
	echo "### $*"
	"${limit[@]}" "$@" </dev/null 2>&1 | tee "$parts_log" || rc=${PIPESTATUS[0]}
	[ "$rc" -ne 130 ] || exit 130 # interrupted, and so is all of it
	[ "$rc" -eq 0 ] || parts_status=1
	sums=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$parts_log" | tail -n 1)
	# A part that did not get to its sum has failed as a whole.
	read -ra sums <<<"$(tr -dc '0-9 ' <<<"${sums:-0 1 0}")"
	for i in 0 1 2; do total[i]=$((total[i] + sums[i])); done
	echo "### $* took $((SECONDS - start)) s"
}

# The last line, and the exit status.
close_parts() {
	[ $parts_status -eq 0 ] || [ "${total[1]}" -ne 0 ] || total[1]=1
	[ "${total[1]}" -eq 0 ] || parts_status=1
	echo "${total[0]} passed, ${total[1]} failed, ${total[2]} skipped"
	exit $parts_status
}
