#!/usr/bin/env bash
# Everything that must pass: `make test`. Ends with a line "N passed, M failed" over all suites.
#
# Formatting, lints and documentation come first and end the run if they fail. The test suites all run, whichever of
# them fails, so that one run shows everything that is broken.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

logs=$(target_dir)/test-logs
suites_failed=()

# suite NAME COMMAND...: runs a suite to its end and remembers whether it failed; its output is also kept.
suite() {
    say "$1"
    if ! "${@:2}" 2>&1 | tee "$logs/$1.log"; then suites_failed+=("$1"); fi
}

# The sum over what each runner says at its end: cargo per test binary, pytest once, node's TAP once.
print_total() {
    local reports=() report
    for report in cargo.log python.log node.tap; do
        if [[ -e $logs/$report ]]; then reports+=("$logs/$report"); fi
    done
    awk '
        /^test result: / { passed += $4; failed += $6 }
        / in [0-9.]+s/ && FILENAME ~ /python/ {
            for (i = 2; i <= NF; i++) {
                if ($i ~ /^passed/) passed += $(i - 1)
                if ($i ~ /^(failed|errors?)/) failed += $(i - 1)
            }
        }
        /^# pass / { passed += $3 }
        /^# (fail|cancelled) / { failed += $3 }
        END { printf "%d passed, %d failed\n", passed, failed }
    ' "${reports[@]}" </dev/null
}

scripts/setup.sh test
scripts/check.sh
rm -rf "$logs"
mkdir -p "$logs"
suite cargo cargo test --workspace --locked --no-fail-fast
suite clients scripts/test-clients.sh "$logs"

say "all suites"
if ((${#suites_failed[@]})); then echo "these suites failed: ${suites_failed[*]}"; fi
print_total
((${#suites_failed[@]} == 0))
