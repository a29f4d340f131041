#!/usr/bin/env bash
# The targets with coverage, by the stable compiler: a line for each, `ok fuzz NAME: ...` or `FAIL fuzz NAME` and why.
#   fuzz/run.sh                    all of them, TIDEWATCH_FUZZ_SECONDS (20) each
#   fuzz/run.sh NAME...            these
#   fuzz/run.sh NAME INPUT...      one, on files with inputs
set -uo pipefail
cd "$(dirname "$0")/.."
export RUST_BACKTRACE=0
seconds=${TIDEWATCH_FUZZ_SECONDS:-20}
targets=(events log_file frames sql)
files=()
if [ -n "${2-}" ] && [ -f "$2" ]; then
  targets=("$1") files=("${@:2}")
elif [ $# != 0 ]; then
  targets=("$@")
fi

if ! command -v "${CXX:-c++}" >/dev/null; then
  for name in "${targets[@]}"; do echo "skipped: fuzz $name needs a C++ compiler for libFuzzer (Debian: apt-get install g++)"; done
  exit 0
fi
# All crates of the workspace are named, so that those of others have the features they have in the tests, and are the same.
if ! RUSTC_WORKSPACE_WRAPPER=$PWD/fuzz/rustc "${CARGO:-cargo}" build --locked --workspace "${targets[@]/#/--bin=}"; then
  for name in "${targets[@]}"; do echo "FAIL fuzz $name: it did not build"; done
  exit 1
fi

kept=$(mktemp -d)
trap 'rm -rf "$kept"' EXIT
export TIDEWATCH_FUZZ_CORPUS=${TIDEWATCH_FUZZ_CORPUS:-$kept}
[ ! -w /dev/shm ] || export TMPDIR=/dev/shm # `log_file` syncs a file for each input
status=0
for name in "${targets[@]}"; do
  found=$kept/$name.found
  mkdir -p "$TIDEWATCH_FUZZ_CORPUS/$name" "$found"
  touch "$TIDEWATCH_FUZZ_CORPUS/$name.dict" # the target fills it before it is read
  args=(-max_total_time="$seconds" -dict="$TIDEWATCH_FUZZ_CORPUS/$name.dict" "$TIDEWATCH_FUZZ_CORPUS/$name")
  [ ${#files[@]} = 0 ] || args=("${files[@]}")
  # an input has 10 s and 2 GiB
  if "${CARGO_TARGET_DIR:-target}/debug/$name" -timeout=10 -rss_limit_mb=2048 -artifact_prefix="$found/" \
    -print_final_stats=1 "${args[@]}" >"$kept/log" 2>&1; then
    runs=$(awk '/^stat::number_of_executed_units/ {print $2}' "$kept/log")
    echo "ok fuzz $name: ${runs:-${#files[@]}} runs$(sed -nE 's/^#[0-9]+\s+DONE.*ft: ([0-9]+) corp: ([0-9]+).*/, \1 features, \2 inputs kept/p' "$kept/log")"
  else
    status=1
    grep -vE '^(#[0-9]+|WARNING:|INFO:|stat::)|NEW_FUNC' "$kept/log" | tail -40
    echo "FAIL fuzz $name"
    for input in "$found"/*; do
      [ -s "$input" ] || continue
      echo "to repeat it ($(basename "$input")):"
      echo "  echo $(base64 -w0 "$input") | base64 -d >input; fuzz/run.sh $name input"
    done
  fi
done
exit $status
