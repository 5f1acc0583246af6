#!/bin/bash
# Sees that the system packages bpfuse is built from are there. On Debian 12 as root it installs what is missing;
# anywhere else it names what is missing and stops. When nothing is missing it changes nothing and takes no time.
# Further packages may be named as arguments.
set -eu

PACKAGES=(clang clang-format llvm libbpf-dev liburing-dev libfuse3-dev fuse3 pkg-config gcc libc6-dev make
	python3-dev python3-venv python3-bpfcc linux-headers-amd64 bpftool git rsync fio "$@")
# Servers of storage engines, for the tests, which start their own; without them those tests are skipped.
SERVERS=(etcd-server postgresql mariadb-server-core)

stop() {
	echo "bpfuse set-up: $*" >&2
	exit 1
}

distribution() {
	# shellcheck disable=SC1091
	(. /etc/os-release 2>/dev/null && echo "${ID:-unknown} ${VERSION_ID:-}") || echo unknown
}

missing_packages() {
	local package
	for package in "${PACKAGES[@]}" "${SERVERS[@]}"; do
		dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || echo "$package"
	done
}

# What a distribution without dpkg can be asked for: the commands and headers that the packages bring.
missing_pieces() {
	local piece
	for piece in clang clang-format gcc make pkg-config fusermount3; do
		command -v "$piece" >/dev/null || echo "$piece"
	done
	for piece in bpf/libbpf.h liburing.h fuse3/fuse_lowlevel.h; do
		[ -e "/usr/include/$piece" ] || echo "/usr/include/$piece"
	done
	/usr/bin/python3 -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || echo "/usr/bin/python3 (3.11 or later)"
	/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || echo "python3-venv"
	/usr/bin/python3 -c 'import bcc' 2>/dev/null || echo "python3-bcc"
	[ -e "$(/usr/bin/python3 -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)/Python.h" ] || echo "Python.h"
}

# Servers are installed to be there, not to run: a policy says so to their packages, unless the system has one.
start_no_services() {
	local policy=/usr/sbin/policy-rc.d
	[ ! -e "$policy" ] || return 0
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
	# shellcheck disable=SC2064
	trap "rm -f $policy" EXIT
}

install_packages() {
	export DEBIAN_FRONTEND=noninteractive
	start_no_services
	echo "installing by apt: $*"
	apt-get -q update || apt-get -q update || stop "apt-get update failed twice"
	apt-get -q install -y --no-install-recommends "$@" || stop "apt-get install failed: $*"
}

if [ "$(distribution)" = "debian 12" ]; then
	mapfile -t missing < <(missing_packages)
	[ ${#missing[@]} -gt 0 ] || exit 0
	[ "$(id -u)" = 0 ] || stop "missing packages; as root: apt-get install ${missing[*]}"
	install_packages "${missing[@]}"
else
	mapfile -t missing < <(missing_pieces)
	[ ${#missing[@]} = 0 ] || stop "this is not Debian 12; install by hand what is missing: ${missing[*]}"
fi
