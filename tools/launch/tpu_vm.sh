#!/usr/bin/env bash
# Train on TPU VMs that a queued resource provides (gcloud), one slice or several.
#
#   tools/launch/tpu_vm.sh create                  ask for the TPU; it waits in the queue
#   tools/launch/tpu_vm.sh setup                   when ACTIVE: this checkout and its packages
#   tools/launch/tpu_vm.sh start  train --config my_recipe.py --config.run_dir=gs://bucket/run
#   tools/launch/tpu_vm.sh watch                   state in the queue, then the log of host 0
#   tools/launch/tpu_vm.sh stop                    SIGTERM to every host: saves, exit code 75
#   tools/launch/tpu_vm.sh resume train ...        the same as start: goes on from the checkpoint
#   tools/launch/tpu_vm.sh delete                  give the TPU back
#
# A host that is told to stop or loses another one is started again by again.sh. When a Spot TPU is
# taken away the queued resource is SUSPENDED: delete, create, setup and resume. Nothing is lost that
# is in gs:// (run_dir and data.dataset must be there: hosts share no disk).
#
# Settings (environment): NAME=dcod-jax ZONE=us-west4-a PROJECT=(gcloud's) TYPE=v5litepod-16
# RUNTIME=v2-alpha-tpuv5-lite SLICES=1 SPOT=no|yes EXTRAS=tpu,gcs,gguf
# --dry-run as the first argument prints the commands and runs none.
set -euo pipefail
shopt -s inherit_errexit

dry_run=""
if [ "${1:-}" = "--dry-run" ]; then
  dry_run=yes
  shift
fi
verb=${1:-help}
[ $# -eq 0 ] || shift

name=${NAME:-dcod-jax}
zone=${ZONE:-us-west4-a}
type=${TYPE:-v5litepod-16}
runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
slices=${SLICES:-1}
extras=${EXTRAS:-tpu,gcs,gguf}
where=(--zone="$zone")
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")

if ! [[ "$slices" =~ ^[1-9][0-9]*$ ]]; then
  echo "tpu_vm.sh: SLICES=$slices must be a positive number" >&2
  exit 2
fi

run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Names of the TPU nodes: one for each slice.
nodes() {
  if [ "$slices" -eq 1 ]; then
    echo "$name"
  else
    for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
  fi
}

# The same command on every host of every slice.
on_all() {
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1"
  done
}

create() {
  local request=(--accelerator-type="$type" --runtime-version="$runtime")
  if [ "$slices" -eq 1 ]; then
    request+=(--node-id="$name")
  else
    request+=(--node-count="$slices" --node-prefix="$name")
  fi
  [ "${SPOT:-no}" != yes ] || request+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${request[@]}"
}

setup() {
  local archive node
  archive=$(mktemp -d)/dcod_jax.tar.gz
  run git archive --format=tar.gz --prefix=dcod_jax/ --output="$archive" HEAD
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:dcod_jax.tar.gz" "${where[@]}" --worker=all
  done
  on_all "set -e; tar xzf dcod_jax.tar.gz; sudo apt-get update -qq; \
sudo apt-get install -qq -y python3.11 python3.11-venv; cd dcod_jax; \
python3.11 -m venv .venv; .venv/bin/pip install -q -e '.[$extras]'"
}

start() {
  if [ $# -eq 0 ]; then
    echo "tpu_vm.sh start: which verb? such as: start train --config my_recipe.py" >&2
    exit 2
  fi
  local words
  words=$(printf '%q ' "$@")
  on_all "cd dcod_jax; if [ -f ~/dcod.pid ] && kill -0 \$(cat ~/dcod.pid) 2>/dev/null; then \
echo 'already running'; exit 1; fi; \
nohup tools/launch/again.sh .venv/bin/python -m dcod_jax.$words >> ~/dcod.log 2>&1 < /dev/null & \
echo \$! > ~/dcod.pid"
}

watch() {
  run gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format="value(state.state)"
  local node
  node=$(nodes | head -n 1)
  run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=0 --command="tail -n 50 -F ~/dcod.log"
}

case "$verb" in
create) create ;;
setup) setup ;;
start | resume) start "$@" ;;
watch) watch ;;
stop) on_all "kill -TERM \$(cat ~/dcod.pid)" ;;
delete) run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
help | -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" ;;
*)
  echo "tpu_vm.sh: unknown verb '$verb'; --help lists them" >&2
  exit 2
  ;;
esac
