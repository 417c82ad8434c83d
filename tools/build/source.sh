# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# Sourced after common.sh: brings the kernel's source into the cache and the
# patch series into that source.  Sets TREE and SOURCE_ID.

SERIES_DIR=$ROOT/patches/7.2
KERNEL_LINE=7.2
TESTED_VERSION=7.2.12
SOURCE_PACKAGE=linux-source-$KERNEL_LINE
SOURCE_SUITES="trixie-backports forky sid"
OWN_SOURCE="pass KERNEL_TARBALL=linux-$KERNEL_LINE.y.tar.xz or KERNEL_SRC=/path/of/a/$KERNEL_LINE.y/tree"

# --- Debian's package ------------------------------------------------------

# The archive this machine already uses, read from apt itself.
debian_archive() {
	# shellcheck disable=SC2016  # the fields are apt's, not the shell's
	apt-get indextargets --format '$(ORIGIN) $(LABEL) $(CREATED_BY) $(REPO_URI)' |
		sed -n 's/^Debian Debian Packages //p' | head -n 1
}

# An apt state of our own, so that the machine's sources, lists and pins stay
# as they are and nothing can be installed from the newer suites by accident.
private_apt() {
	local archive keyring suite dir=$CACHE/apt
	archive=$(debian_archive)
	[ -n "$archive" ] || die "apt knows no archive of Debian" "run apt-get update, or $OWN_SOURCE"
	keyring=$(find /usr/share/keyrings -name 'debian-archive-keyring.*' | head -n 1)
	mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
	for suite in $SOURCE_SUITES; do
		say "deb [signed-by=$keyring] $archive $suite main"
	done >"$dir/sources.list"
	cat >"$dir/apt.conf" <<-EOF
		Dir::Etc::SourceList "$dir/sources.list";
		Dir::Etc::SourceParts "/dev/null";
		Dir::State::Lists "$dir/lists";
		Dir::Cache "$dir/cache";
		APT::Sandbox::User "";
		Acquire::Languages "none";
		Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
		Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
		#clear APT::Update::Post-Invoke;
		#clear APT::Update::Post-Invoke-Success;
	EOF
	export APT_CONFIG=$dir/apt.conf
}

download_debian_source() (
	set -e
	private_apt
	# One suite may be missing or broken while another has the package.
	apt-get update || true
	versions=$(apt-cache madison $SOURCE_PACKAGE | awk -F ' *[|] *' '{ print $2 }' | sort -rV -u)
	version=$(grep -m 1 "^$TESTED_VERSION-" <<<"$versions" || head -n 1 <<<"$versions")
	[ -n "$version" ] || die "the archive has no package $SOURCE_PACKAGE any more" "$OWN_SOURCE"
	mkdir -p "$CACHE/download"
	cd "$CACHE/download"
	apt-get download "$SOURCE_PACKAGE=$version"
)

newest_download() {
	local debs=("$CACHE/download/${SOURCE_PACKAGE}_"*.deb)
	[ -e "${debs[0]}" ] || return 0
	printf '%s\n' "${debs[@]}" | grep -m 1 "_$TESTED_VERSION-" || printf '%s\n' "${debs[@]}" | sort -rV | head -n 1
}

# --- Unpacking -------------------------------------------------------------

# All three unpack into a directory without the leading component.
unpack_deb() { dpkg-deb --fsys-tarfile "$1" | tar -xO --wildcards '*/linux-source-*.tar.xz' | tar -xJ --strip-components=1 -C "$2"; }
unpack_tarball() { tar -xf "$1" --strip-components=1 -C "$2"; }
unpack_tree() { rsync -a --exclude=/.git "$1/" "$2/" && make -C "$2" mrproper; }

# unpack HOW FROM: fills TREE, which appears only when it is complete.  Builds of
# an earlier TREE go too: times of unpacked files tell make nothing about them.
unpack() {
	rm -rf "$TREE" "$TREE".*
	mkdir -p "$TREE.new/.kvmi"
	: >"$TREE.new/.kvmi/series"
	"unpack_$1" "$2" "$TREE.new"
	mv "$TREE.new" "$TREE"
}

# --- The series ------------------------------------------------------------

series() { sed -e 's/[[:space:]]*#.*//' -e '/^$/d' "$1"; }

do_patch() { patch -d "$TREE" -p1 -s -f --no-backup-if-mismatch -F0 "$@"; }

# try_patch FILE [-R]: wholly or not at all.
try_patch() { do_patch --dry-run -i "$@" >/dev/null && do_patch -i "$@"; }

touched_files() { sed -n -e 's,^+++ b/\([^\t]*\).*,\1,p' -e 's,^--- a/\([^\t]*\).*,\1,p' "$@" | sort -u; }

# Makes the tree carry the series of this checkout.  The patches it carries are
# kept beside it: those that changed are reversed and the new ones applied.  A
# file that ends up as it was gets its old time back, so that kbuild rebuilds
# only what depends on a real change.
sync_series() {
	local state=$TREE/.kvmi saved=$TREE/.kvmi/saved have want same=0 i file
	mapfile -t have < <(series "$state/series")
	mapfile -t want < <(series "$SERIES_DIR/series")
	while [ $same -lt ${#want[@]} ] && [ "${have[same]:-}" = "${want[same]}" ] &&
		cmp -s "$state/${want[same]}" "$SERIES_DIR/${want[same]}"; do
		same=$((same + 1))
	done

	rm -rf "$saved"
	mkdir "$saved"
	for ((i = same; i < ${#have[@]}; i++)); do touched_files "$state/${have[i]}"; done >"$saved/files"
	for ((i = same; i < ${#want[@]}; i++)); do touched_files "$SERIES_DIR/${want[i]}"; done >>"$saved/files"
	while read -r file; do
		[ ! -f "$TREE/$file" ] || (cd "$TREE" && cp -p --parents "$file" "$saved")
	done <"$saved/files"

	for ((i = ${#have[@]} - 1; i >= same; i--)); do
		try_patch "$state/${have[i]}" -R || return 2
		say "reversed ${have[i]}"
		sed -i '$d' "$state/series"
	done
	for ((i = same; i < ${#want[@]}; i++)); do
		if ! try_patch "$SERIES_DIR/${want[i]}"; then
			say "${want[i]} does not apply to $SOURCE_ID"
			return 1
		fi
		say "applied ${want[i]}"
		cp "$SERIES_DIR/${want[i]}" "$state/"
		say "${want[i]}" >>"$state/series"
	done

	while read -r file; do
		! cmp -s "$saved/$file" "$TREE/$file" 2>/dev/null || touch -r "$saved/$file" "$TREE/$file"
	done <"$saved/files"
	rm -r "$saved"
}

series_in_sync() {
	local patch
	[ "$(series "$TREE/.kvmi/series")" = "$(series "$SERIES_DIR/series")" ] || return 1
	for patch in $(series "$SERIES_DIR/series"); do
		cmp -s "$TREE/.kvmi/$patch" "$SERIES_DIR/$patch" || return 1
	done
}

# --- All of it -------------------------------------------------------------

tree_id() {
	local id
	id=$(git -C "$1" describe --always --dirty 2>/dev/null || make -s -C "$1" kernelversion)
	say "$id-$(realpath "$1" | sha256sum | head -c 8)"
}

# prepare_source [VARIANT]: with another series in SERIES_DIR than usual, the
# tree needs a name of its own.
prepare_source() {
	local how from
	[ -f "$SERIES_DIR/series" ] || die "no series in $SERIES_DIR"
	if [ -n "${KERNEL_SRC:-}" ] && [ -f "$KERNEL_SRC/include/linux/kvm_introspection.h" ]; then
		# A tree that has the series is its owner's: built as it is.
		TREE=$(realpath "$KERNEL_SRC")
		SOURCE_ID=own
		return
	elif [ -n "${KERNEL_SRC:-}" ]; then
		how=tree from=$KERNEL_SRC SOURCE_ID=$(tree_id "$KERNEL_SRC")
	elif [ -n "${KERNEL_TARBALL:-}" ]; then
		how=tarball from=$KERNEL_TARBALL SOURCE_ID=tar-$(sha256sum "$KERNEL_TARBALL" | head -c 12)
	else
		how=deb from=$(newest_download)
		if [ -z "$from" ]; then
			command -v apt-get >/dev/null || die "no source of Linux $KERNEL_LINE" "$OWN_SOURCE"
			step "download $SOURCE_PACKAGE" "$OWN_SOURCE" download_debian_source
			from=$(newest_download)
		fi
		SOURCE_ID=$(basename "$from" _all.deb | sed -e 's/.*_//' -e 's/%3a/:/' | tr '~+:' '-')
	fi
	TREE=$CACHE/linux-$SOURCE_ID${1:-}
	[ -d "$TREE" ] || step "unpack linux $SOURCE_ID" "$OWN_SOURCE" unpack $how "$from"
	series_in_sync && return
	# A series that cannot be reversed leaves a tree of unknown content.
	step "apply the patch series" "use a $KERNEL_LINE.y nearer to $TESTED_VERSION: $OWN_SOURCE" \
		sync_series_or_unpack $how "$from"
}

sync_series_or_unpack() {
	local rc=0
	sync_series || rc=$?
	[ $rc -eq 2 ] || return $rc
	say "unpacking the source anew"
	unpack "$@"
	sync_series
}
