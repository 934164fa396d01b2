# Sourced by check.sh and train.sh at the project's root: installs what bundle.py packed, and sets the paths.
#
#   PYTHON  the interpreter that has torch with CUDA (default python3)
#   BUNDLE  what bundle.py made (default .gpu)
#   KEEP    where things stay between the two calls (default /tmp/specauf-gpu)
#   OUT     where results go (default: the first argument, else out/gpu)

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTHON=${PYTHON:-python3}
BUNDLE=${BUNDLE:-.gpu}
KEEP=${KEEP:-/tmp/specauf-gpu}
OUT=${1:-${OUT:-out/gpu}}
mkdir -p "$KEEP" "$OUT"

# A call brings one part of the bundle, because a transfer has a limit. So each part is put away for the next call.
if [ -d "$BUNDLE/wheels" ] && [ ! -f "$KEEP/installed" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$KEEP/site" "$BUNDLE"/wheels/*.whl
    touch "$KEEP/installed"
fi
for part in first second; do
    if [ -d "$BUNDLE/$part" ]; then
        mkdir -p "$KEEP/$part"
        cp -r "$BUNDLE/$part/." "$KEEP/$part"
    fi
done
if [ -f "$KEEP/first/commit" ]; then
    SPECAUF_COMMIT=$(cat "$KEEP/first/commit")
    export SPECAUF_COMMIT
fi

# The checkout's code comes before the installed copy, which is there for its version number.
export PYTHONPATH=$PWD:$KEEP/site
if command -v nvidia-smi > /dev/null; then
    nvidia-smi -L
fi
