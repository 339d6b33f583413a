# What the scripts share. Sourced, never run; sourcing it goes to the root of the project.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin" # where rustup puts cargo, if the shell was not told

say() { printf '\n==> %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Where cargo puts what it builds, whatever the environment and the user's own settings say.
target_dir() {
    cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/'
}

# Processes to end with the script. By their ids only: others may run the same programs.
children=()

stop_children() {
    local child
    for child in "${children[@]}"; do kill "$child" 2>/dev/null || true; done
    for child in "${children[@]}"; do wait "$child" 2>/dev/null || true; done
    children=()
}

# wait_for URL PID LOG: until URL answers 200; fails with the log if the process ends before, or after 20 seconds.
# LOG may be "-" for a process that writes to the terminal.
wait_for() {
    local tries
    for ((tries = 0; tries < 200; tries++)); do
        if curl --silent --fail --noproxy '*' --max-time 2 --output /dev/null \
            --header "Authorization: Bearer sk-mock" "$1"; then return; fi
        kill -0 "$2" 2>/dev/null || break
        sleep 0.1
    done
    if [[ $3 != - ]]; then cat "$3" >&2; fi
    die "$1 does not answer"
}

# must_be_free HOST:PORT: else what answers there could pass for what is about to be started.
must_be_free() {
    if (exec 3<>"/dev/tcp/${1/://}") 2>/dev/null; then die "$1 is in use by another process"; fi
}

# json_field NAME: the string field NAME of the JSON object on standard input.
json_field() {
    local value
    value=$(sed -n "s/.*\"$1\": *\"\\([^\"]*\\)\".*/\\1/p" | head -n 1)
    [[ -n $value ]] || die "no \"$1\" was printed"
    printf '%s\n' "$value"
}
