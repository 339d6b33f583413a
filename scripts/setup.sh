#!/usr/bin/env bash
# setup.sh build | test: installs what building the gateway (or testing it) needs and this machine does not have.
#
# Only what is missing, from the system's package manager. A machine that has everything is not touched, and needs
# neither root nor sudo.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

missing=()

has() { command -v "$1" >/dev/null; }

# A compiler without the C library's headers is no compiler.
can_compile() { echo '#include <stdio.h>' | cc -x c -c -o /dev/null - 2>/dev/null; }

has_postgres() { has initdb || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; }

for_build() {
    has cargo || die "Rust is missing: install it from https://rustup.rs, then run this again"
    can_compile || missing+=(gcc libc6-dev)
    has cmake || missing+=(cmake) # zlib-ng, which Pingora uses, is built with it
    has make || missing+=(make)
    has curl || missing+=(curl)
}

for_test() {
    has_postgres || missing+=(postgresql)
    has redis-server || missing+=(redis-server)
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3 python3-venv)
    has node || missing+=(nodejs)
    has npm || missing+=(npm)
    has openssl || missing+=(openssl)
    has setpriv || missing+=(util-linux)
    cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
    cargo clippy --version >/dev/null 2>&1 || rustup component add clippy
}

install_missing() {
    ((${#missing[@]})) || return 0
    has apt-get || die "these are missing (by their Debian names); install them first: ${missing[*]}"
    local root=()
    if ((EUID != 0)); then
        has sudo || die "these are missing, and there is no sudo: apt-get install ${missing[*]}"
        root=(sudo)
    fi
    say "installing: ${missing[*]}"
    local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes)
    "${apt[@]}" update </dev/null
    "${apt[@]}" install --no-install-recommends "${missing[@]}" </dev/null
}

case "${1:-}" in
    build) for_build ;;
    test) for_build && for_test ;;
    *) die "usage: setup.sh build|test" ;;
esac
install_missing
