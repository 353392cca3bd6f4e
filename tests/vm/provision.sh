#!/usr/bin/env bash
# Sets up an agent host on Debian: packages, users, directories, Mooring in a virtual environment, systemd units. The
# Vagrantfile and the image of `make vm-test` both use it; nothing else says how an agent host is made.
#
#   provision.sh            everything; safe to run again, and again with a newer tree: that is the upgrade
#   provision.sh packages   prints the Debian packages an agent host needs, one per line
#
# MOORING_SOURCE   the tree to install (default: the one this script is in)
# MOORING_WHEELS   a directory with the wheels of requirements.lock, for a host that reaches no package index
set -euo pipefail

PACKAGES=(
    s3fs fuse3                      # what mounts
    podman crun netavark            # what sessions run in
    python3 python3-venv            # what Mooring runs in
    ca-certificates iproute2 kmod procps util-linux
    busybox-static rsync            # the tests: the root of a container, and the tree on its way here
)
HOME_DIR=/opt/mooring
VENV=$HOME_DIR/venv
SOURCE=${MOORING_SOURCE:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}

say() { printf 'provision: %s\n' "$*"; }

install_packages() {
    local missing=() package
    for package in "${PACKAGES[@]}"; do
        [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet
    apt-get install --yes --quiet --no-install-recommends "${missing[@]}"
}

# The proxy and the manager extension run as this user; the agent, which mounts, as root.
make_users() {
    getent passwd mooring >/dev/null && return
    say "adding the user mooring"
    useradd --system --user-group --home-dir /var/lib/mooring --no-create-home --shell /usr/sbin/nologin mooring
}

make_directories() {
    install -d -m 0755 "$HOME_DIR"
    install -d -m 0750 -g mooring /etc/mooring
    # systemd makes /var/lib/mooring and /run/mooring by the units.
    printf 'fuse\noverlay\n' >/etc/modules-load.d/mooring.conf
}

pip_install() {
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"
}

install_mooring() {
    local lock lock_file="$SOURCE/requirements.lock" from=()
    [ -n "${MOORING_WHEELS:-}" ] && from=(--no-index --find-links "$MOORING_WHEELS")
    lock=$(sha256sum "$lock_file" | cut -d' ' -f1)
    if [ "$(cat "$VENV/.lock" 2>/dev/null)" != "$lock" ]; then
        say "installing the packages of requirements.lock"
        python3 -m venv --clear "$VENV"
        pip_install "${from[@]}" --require-hashes --requirement "$lock_file"
        echo "$lock" >"$VENV/.lock"
    fi
    say "installing Mooring from $SOURCE"
    pip_install --no-index --no-deps --no-build-isolation --force-reinstall "$SOURCE"
    ln -sfn "$VENV/bin/mooring" /usr/bin/mooring # where the units look for it
}

install_units() {
    install -m 0644 "$SOURCE"/configs/systemd/*.service /etc/systemd/system/
    install -m 0644 "$SOURCE"/configs/*.sample.toml /etc/mooring/
    [ -d /run/systemd/system ] || return 0
    systemctl daemon-reload
    # A host that is configured is upgraded: sessions keep their mounts while the agent restarts.
    systemctl try-restart mooring-agent.service
}

case "${1:-all}" in
packages)
    printf '%s\n' "${PACKAGES[@]}"
    ;;
all)
    [ "$(id -u)" -eq 0 ] || { echo "provision: must run as root" >&2; exit 1; }
    install_packages
    make_users
    make_directories
    install_mooring
    install_units
    say "done: $(/usr/bin/mooring --version)"
    ;;
*)
    echo "usage: provision.sh [all|packages]" >&2
    exit 2
    ;;
esac
