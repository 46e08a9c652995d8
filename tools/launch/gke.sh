#!/usr/bin/env bash
# Train on GKE TPU node pools with a JobSet, or through xpk.
#
#   tools/launch/gke.sh image                      build and push the image (Dockerfile beside this)
#   tools/launch/gke.sh start  train --config my_recipe.py --config.run_dir=gs://bucket/run
#   tools/launch/gke.sh watch                      JobSet, Pods, then the log of host 0
#   tools/launch/gke.sh stop                       deletes the JobSet: SIGTERM, every host saves
#   tools/launch/gke.sh resume train ...           the same as start: goes on from the checkpoint
#   tools/launch/gke.sh xpk-start train ...        the same through xpk (CLUSTER must be set)
#   tools/launch/gke.sh xpk-watch | xpk-stop
#   tools/launch/gke.sh render train ...           the manifest that start applies
#
# The recipe must be in the image (configs/ is) or at a gs:// path. run_dir and data.dataset must be
# in gs://, and ACCOUNT a Kubernetes service account that may read and write there (Workload
# Identity). JobSet has to be installed in the cluster; xpk clusters have it.
#
# Settings (environment): IMAGE=(required) NAME=dcod-jax ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4
# CHIPS=4 (of a host) SLICES=1 RESTARTS=100 ACCOUNT=default NAMESPACE=default, and for xpk
# CLUSTER=(required) TYPE=v5litepod-16 ZONE, PROJECT=(gcloud's).
# --dry-run as the first argument prints the commands and runs none.
set -euo pipefail
shopt -s inherit_errexit

here=$(cd "$(dirname "$0")" && pwd)
dry_run=""
if [ "${1:-}" = "--dry-run" ]; then
  dry_run=yes
  shift
fi
verb=${1:-help}
[ $# -eq 0 ] || shift

name=${NAME:-dcod-jax}
accelerator=${ACCELERATOR:-tpu-v5-lite-podslice}
topology=${TOPOLOGY:-4x4}
chips=${CHIPS:-4}
slices=${SLICES:-1}
restarts=${RESTARTS:-100}
account=${ACCOUNT:-default}
namespace=(--namespace="${NAMESPACE:-default}")

fail() {
  echo "gke.sh: $1" >&2
  exit 2
}

run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

need() {
  [ -n "${!1:-}" ] || fail "set $1 ($2)"
}

# Hosts of a slice: the topology's chips over those of a host.
hosts() {
  local total=1 side
  [[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "TOPOLOGY=$topology: expected such as 4x4 or 2x2x4"
  for side in ${topology//x/ }; do total=$((total * side)); done
  ((total % chips == 0)) || fail "TOPOLOGY=$topology has $total chips, no multiple of CHIPS=$chips"
  echo $((total / chips))
}

# The words as elements of a YAML list, each a quoted JSON string.
yaml_words() {
  local word first=yes
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    [ -n "$first" ] || printf ', '
    printf '"%s"' "$word"
    first=""
  done
}

# The manifest with its settings filled in; bash alone, so that no value is read as a pattern.
render() {
  [ $# -gt 0 ] || fail "which verb? such as: start train --config my_recipe.py"
  need IMAGE "the image that every host runs"
  local text count
  count=$(hosts)
  text=$(cat "$here/jobset.yaml")
  # shellcheck disable=SC2016  # the template's ${...} are text here
  {
    text=${text//'${NAME}'/"$name"}
    text=${text//'${RESTARTS}'/"$restarts"}
    text=${text//'${SLICES}'/"$slices"}
    text=${text//'${HOSTS}'/"$count"}
    text=${text//'${ACCOUNT}'/"$account"}
    text=${text//'${ACCELERATOR}'/"$accelerator"}
    text=${text//'${TOPOLOGY}'/"$topology"}
    text=${text//'${CHIPS}'/"$chips"}
    text=${text//'${IMAGE}'/"$IMAGE"}
    text=${text//'${COMMAND}'/"$(yaml_words "dcod_jax.$1" "${@:2}")"}
  }
  printf '%s\n' "$text"
}

start() {
  local manifest
  manifest=$(render "$@")
  if [ -n "$dry_run" ]; then
    printf '%q ' kubectl apply "${namespace[@]}" -f -
    printf '<<EOT\n%s\nEOT\n' "$manifest"
  else
    printf '%s\n' "$manifest" | kubectl apply "${namespace[@]}" -f -
  fi
}

xpk_where() {
  need CLUSTER "the xpk cluster"
  xpk=(--cluster="$CLUSTER")
  [ -z "${ZONE:-}" ] || xpk+=(--zone="$ZONE")
  [ -z "${PROJECT:-}" ] || xpk+=(--project="$PROJECT")
}

xpk_start() {
  [ $# -gt 0 ] || fail "which verb? such as: xpk-start train --config my_recipe.py"
  need IMAGE "the image that every host runs"
  xpk_where
  local words
  words=$(printf '%q ' python -m "dcod_jax.$1" "${@:2}")
  run xpk workload create --workload="$name" "${xpk[@]}" --tpu-type="${TYPE:-v5litepod-16}" \
    --num-slices="$slices" --docker-image="$IMAGE" --max-restarts="$restarts" \
    --restart-on-exit-codes=75,76 --termination-grace-period-seconds=300 --command="${words% }"
}

case "$verb" in
image)
  need IMAGE "its name in a registry"
  run docker build --file "$here/Dockerfile" --tag "$IMAGE" "$here/../.."
  run docker push "$IMAGE"
  ;;
render) render "$@" ;;
start | resume)
  start "$@"
  ;;
watch)
  run kubectl get jobset "$name" "${namespace[@]}"
  run kubectl get pods "${namespace[@]}" --selector="jobset.sigs.k8s.io/jobset-name=$name"
  run kubectl logs "${namespace[@]}" --follow --tail=50 \
    --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  ;;
stop | delete) run kubectl delete jobset "$name" "${namespace[@]}" ;;
xpk-start | xpk-resume) xpk_start "$@" ;;
xpk-watch)
  xpk_where
  run xpk workload list "${xpk[@]}"
  ;;
xpk-stop)
  xpk_where
  run xpk workload delete --workload="$name" "${xpk[@]}" --force
  ;;
help | -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" ;;
*) fail "unknown verb '$verb'; --help lists them" ;;
esac
