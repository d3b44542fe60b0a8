#!/usr/bin/env bash
# Everything worth knowing on a machine with a GPU, in under ten minutes and without an install: is
# every op right, how fast is it, what does it launch. Needs PyTorch >= 2.11 and Triton >= 3.6.
#
#   OUT=runs/gpu PYTHON=python3 bash benchmarks/gpu.sh
#
# Results go to OUT; a short table comes last. Without a GPU the steps that need one are skipped, and
# say so. The exit code is 1 if a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
# The checkout's own packages, whatever is installed.
unset PYTHONSAFEPATH
export PYTHONPATH=$PWD
failed=0

has() { "$PYTHON" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"; }

# step NAME SECONDS COMMAND...: run within the time, keep the output in OUT, show its end.
step() {
    local name=$1 seconds=$2
    shift 2
    if ! $gpu; then
        echo "== $name: skipped: no GPU"
        return
    fi
    local began=$SECONDS code=0
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    # 124: the time is over; what was measured so far is kept.
    [[ $code == 0 || $code == 124 ]] || failed=1
    echo "== $name: exit $code after $((SECONDS - began)) s, $OUT/$name.log"
    tail -n 12 "$OUT/$name.log"
}

if ! has torch || ! has triton; then
    echo "$PYTHON has no PyTorch with Triton: set PYTHON to one that has (>= 2.11, >= 3.6)" >&2
    exit 2
fi
"$PYTHON" - <<'EOF' | tee "$OUT/machine.log"
import platform, torch, triton

print("Python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    print(f"GPU {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
EOF
gpu=false
if grep -q ^GPU "$OUT/machine.log"; then gpu=true; fi

step check 60 "$PYTHON" -m benchmarks check
if ! has pytest; then
    echo "== tests: skipped: pytest is not installed"
elif has timm; then
    step tests 150 "$PYTHON" -m pytest -q -m gpu
else
    # The front end's tests need its packages.
    step tests 150 "$PYTHON" -m pytest -q -m gpu tests/kernels
fi
step bench 270 "$PYTHON" -m benchmarks --minutes 4 --out "$OUT/results"
step trace 60 "$PYTHON" -m benchmarks trace --out "$OUT/trace"
$gpu && "$PYTHON" -m benchmarks table --summary "$OUT"/results/*/
exit $failed
