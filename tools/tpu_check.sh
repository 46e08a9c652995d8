#!/usr/bin/env bash
# Which kernel and which sums of gradients are right on a TPU VM (v5e, 1 to 8 chips), in 10 minutes
# (docs/devices.md). The result is one file, tpu_check.jsonl.
#
#     python3.11 -m venv .venv && .venv/bin/pip install '.[tpu]'
#     tools/tpu_check.sh [--out FILE] [--parts NAME,…] [--rehearse]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" tools/device_check.py --device tpu --seconds 580 "$@"
