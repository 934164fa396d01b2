#!/usr/bin/env bash
# First call on the GPU machine, about five minutes: installs, runs the tests for CUDA, times real shapes.
#
#   bash tests/gpu/check.sh [OUT]
#
# Brings gpu_tests.json and gpu_shapes.json. SELECT (pytest's -k) and JOBS (of shapes.py) choose less; setup.sh has the
# other variables.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/gpu/setup.sh

# SIGINT makes pytest stop and report what it has. Failed tests do not keep the shapes from being timed.
timeout --signal=INT 240 "$PYTHON" tests/gpu/cuda_tests.py --select "${SELECT:-cuda}" --json "$OUT/gpu_tests.json" \
    2>&1 | tee "$OUT/gpu_tests.log" | tail -n 15 || echo "some tests failed: see gpu_tests.json"

# Word by word, so that JOBS may hold several. A job that has begun is over within two minutes.
timeout 240 "$PYTHON" tests/gpu/shapes.py ${JOBS:-} --seconds 150 --json "$OUT/gpu_shapes.json" \
    > "$OUT/gpu_shapes.log" 2>&1 || echo "shapes.py stopped early"
tail -n 3 "$OUT/gpu_shapes.log"
