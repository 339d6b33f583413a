#!/usr/bin/env bash
# Builds the gateway and runs it, with a first user and key: `make run`.
#
# With OPENAI_API_KEY set its upstream is OpenAI, else `tollgate mock`. What it makes is under data/ (not in git):
#   tollgate.db, fernet.key   the gateway's own
#   first-key                 the first key, readable by its owner only, so that the curl line can be shown each time;
#                             every other key is shown once and kept nowhere
#   openai.toml               the configuration for OpenAI, yours to edit
# Whatever is there already is used as it is.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

GATEWAY=127.0.0.1:8080 # the default of the configuration
MOCK=127.0.0.1:9100    # as in conf/dev.toml
FIRST_KEY=data/first-key

choose_upstream() {
    if [[ -z ${OPENAI_API_KEY:-} ]]; then
        config=conf/dev.toml model=gpt-4o
        return
    fi
    config=data/openai.toml model=gpt-4o-mini
    [[ -e $config ]] || cat >"$config" <<'TOML'
# Made by `make run`. conf/tollgate.toml shows every setting.
[[upstream]]
name = "openai"
base_url = "https://api.openai.com/v1"
credential = "${OPENAI_API_KEY}"
TOML
}

tollgate() { "$binary" --config "$config" "$@"; }

make_first_key() {
    if [[ -s $FIRST_KEY && -e data/tollgate.db ]]; then return; fi
    say "database, first user and first key"
    [[ -e data/tollgate.db ]] || tollgate init
    # The user is there already if only the key's file was removed; the key's creation fails if it is not.
    tollgate user create --name default >/dev/null 2>&1 || true
    local made
    made=$(tollgate key create --user default --name "first-$(date +%Y%m%d-%H%M%S)" --json)
    json_field key <<<"$made" >"$FIRST_KEY"
}

start() {
    if [[ $config == conf/dev.toml ]]; then
        say "OPENAI_API_KEY is not set: the upstream is tollgate mock"
        must_be_free "$MOCK"
        "$binary" mock --listen "$MOCK" >data/mock.log 2>&1 &
        children+=("$!")
        wait_for "http://$MOCK/v1/models" "$!" data/mock.log
    fi
    must_be_free "$GATEWAY"
    # The binary itself, not the function: `$!` must be the gateway, and no shell around it.
    "$binary" --config "$config" serve &
    gateway=$!
    children+=("$gateway")
    wait_for "http://$GATEWAY/health" "$gateway" -
}

show_curl() {
    say "the gateway runs (Ctrl-C ends it); paste this into another terminal:"
    cat <<TEXT

curl http://$GATEWAY/v1/chat/completions -H "Authorization: Bearer $(<"$FIRST_KEY")" -H "Content-Type: application/json" -d '{"model":"$model","messages":[{"role":"user","content":"Hello!"}]}'

TEXT
}

scripts/setup.sh build
say "building (the first time takes some minutes)"
cargo build --release --bin tollgate --locked
binary=$(target_dir)/release/tollgate

umask 077
mkdir -p data
choose_upstream
make_first_key
trap stop_children EXIT
trap 'exit 0' INT TERM
start
show_curl
wait "$gateway"
