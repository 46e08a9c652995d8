#!/usr/bin/env bash
# Run a command, and run it again while it ends with 75 (stopped after saving, as at a preemption
# notice) or 76 (another process was lost or stuck): it goes on from its last checkpoint.
#
#   tools/launch/again.sh python -m dcod_jax.train --config my_recipe.py
#
# Any other exit code is passed on. SIGTERM and SIGINT go to the command, and then it is not
# started again. AGAIN_LIMIT (default 100) bounds the restarts, AGAIN_WAIT (default 10) is the
# seconds between two, so that the other hosts notice the loss first.
set -u

limit=${AGAIN_LIMIT:-100}
pause=${AGAIN_WAIT:-10}
stopped=""
child=""

forward() {
  stopped=yes
  [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null
}
trap 'forward TERM' TERM
trap 'forward INT' INT

if [ $# -eq 0 ] || [ "$1" = --help ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
  exit 0
fi

for ((attempt = 0; ; attempt++)); do
  "$@" &
  child=$!
  # A signal ends the wait before the command has ended: it is waited for again.
  while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=""
  if [ "$code" -ne 75 ] && [ "$code" -ne 76 ]; then exit "$code"; fi
  if [ -n "$stopped" ]; then exit "$code"; fi
  if [ "$attempt" -ge "$limit" ]; then
    echo "again.sh: gave up after $limit restarts" >&2
    exit "$code"
  fi
  echo "again.sh: exit code $code, restart $((attempt + 1)) in $pause s" >&2
  sleep "$pause" &
  child=$!
  wait "$child"
  child=""
  if [ -n "$stopped" ]; then exit "$code"; fi
done
