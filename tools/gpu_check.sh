#!/usr/bin/env bash
# Parity, speed and memory on one NVIDIA GPU, in under 9 minutes from a bare machine that has JAX,
# torch, transformers, flax, optax and orbax, and no network (docs/devices.md):
#
#     make gpu-wheels                     # where there is a network: what is missing there
#     tools/gpu_check.sh [--out FILE] [--parts NAME,…] [--rehearse]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-build/gpu_wheels}
if compgen -G "$wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" tools/device_check.py --device gpu "$@"
