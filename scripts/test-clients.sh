#!/usr/bin/env bash
# The official OpenAI SDKs against a running gateway, over HTTP and HTTPS: test-clients.sh [LOG_DIRECTORY]
#
# Starts `tollgate mock` and a gateway of its own in a temporary directory, on ports that are free, with a certificate
# of a private authority. Nothing outside that directory and the target directory is touched, and both processes end
# with the script. LOG_DIRECTORY receives python.log, node.tap and gateway.log.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

target=$(target_dir)
clients=$target/test-clients
logs=${1:-$target/test-logs}
binary=$target/debug/tollgate
work=$(mktemp -d)
trap 'stop_children; rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

# Four ports that are free at once, so that they differ.
free_ports() {
    python3 - <<'PYTHON'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
print(*(s.getsockname()[1] for s in sockets))
PYTHON
}

# A private authority in $work/ca.pem, and a certificate by it in $work/tls.{pem,key}. Its extensions are those that
# Python's strict verification asks for.
make_certificate() {
    cat >"$work/openssl.cnf" <<'CONF'
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = IP:127.0.0.1, DNS:localhost
CONF
    local new_key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -config "$work/openssl.cnf")
    openssl req -x509 "${new_key[@]}" -extensions authority -days 2 -subj "/CN=tollgate test authority" \
        -keyout "$work/ca.key" -out "$work/ca.pem"
    openssl req "${new_key[@]}" -subj "/CN=localhost" -keyout "$work/tls.key" -out "$work/tls.csr"
    openssl x509 -req -in "$work/tls.csr" -CA "$work/ca.pem" -CAkey "$work/ca.key" -CAcreateserial -days 2 \
        -extfile "$work/openssl.cnf" -extensions server -out "$work/tls.pem"
}

write_config() {
    cat >"$work/tollgate.toml" <<TOML
[server]
listen = ["127.0.0.1:$http_port"]
tls_listen = ["127.0.0.1:$tls_port"]
admin_listen = "127.0.0.1:$admin_port"

[tls]
cert = "$work/tls.pem"
key = "$work/tls.key"

[store]
url = "sqlite://$work/tollgate.db"

[secrets]
fernet_keys_file = "$work/fernet.key"

# The tests ask for faults one after the other, of the only upstream there is.
[breaker]
failures = 0
failure_percent = 0

[[upstream]]
name = "mock"
base_url = "http://127.0.0.1:$mock_port/v1"
credential = "sk-mock"
models = ["gpt-4o-mini", "*"]
TOML
}

# In the temporary directory, because settings that are left out have paths relative to it.
tollgate() { (cd "$work" && exec "$binary" --config "$work/tollgate.toml" "$@"); }

# make_key NAME [OPTION...]: prints the secret of a new key.
make_key() { tollgate key create --user clients --name "$@" --json | json_field key; }

start_gateway() {
    "$binary" mock --listen "127.0.0.1:$mock_port" >"$work/mock.log" 2>&1 &
    children+=("$!")
    wait_for "http://127.0.0.1:$mock_port/v1/models" "$!" "$work/mock.log"
    tollgate init >/dev/null
    tollgate user create --name clients >/dev/null
    TOLLGATE_API_KEY=$(make_key any)
    # An address of the network that is reserved for documentation: nobody calls from there.
    TOLLGATE_FORBIDDEN_KEY=$(make_key elsewhere --allow-ip 192.0.2.1)
    # Not through the function: `$!` must be the gateway, and no shell around it.
    (cd "$work" && exec "$binary" --config "$work/tollgate.toml" serve) >"$logs/gateway.log" 2>&1 &
    children+=("$!")
    wait_for "http://127.0.0.1:$http_port/health" "$!" "$logs/gateway.log"
    export TOLLGATE_API_KEY TOLLGATE_FORBIDDEN_KEY
    export TOLLGATE_BASE_URL=http://127.0.0.1:$http_port/v1
    export TOLLGATE_TLS_BASE_URL=https://127.0.0.1:$tls_port/v1
    export TOLLGATE_CA_FILE=$work/ca.pem
}

python_tests() {
    say "Python SDK"
    local python=$clients/venv/bin/python
    if ! "$python" -m pip --version >/dev/null 2>&1; then python3 -m venv --clear "$clients/venv" || return; fi
    "$python" -m pip install --quiet --disable-pip-version-check -r tests/clients/python/requirements.txt || return
    PYTHONDONTWRITEBYTECODE=1 "$python" -m pytest -p no:cacheprovider tests/clients/python 2>&1 | tee "$logs/python.log"
}

# In a copy: node looks for packages beside the test, and none belong into the source tree.
node_tests() {
    say "Node SDK"
    rm -rf "$clients/node" && mkdir "$clients/node" || return
    cp tests/clients/node/{package.json,package-lock.json,*.mjs} "$clients/node" || return
    (
        cd "$clients/node" || exit
        npm ci --no-audit --no-fund --loglevel=error || exit
        node --test --test-reporter=spec --test-reporter-destination=stdout \
            --test-reporter=tap --test-reporter-destination="$logs/node.tap" ./*.mjs
    )
}

mkdir -p "$clients" "$logs"
cargo build --locked --bin tollgate
read -r http_port tls_port admin_port mock_port < <(free_ports)
make_certificate 2>"$work/openssl.log" || { cat "$work/openssl.log" >&2; die "openssl could not make a certificate"; }
write_config
start_gateway

# `||` switches `set -e` off in what it follows, so the suites return by themselves.
failed=()
python_tests || failed+=(Python)
node_tests || failed+=(Node)
if ((${#failed[@]})); then die "failed: ${failed[*]}; the gateway's side: $logs/gateway.log"; fi
