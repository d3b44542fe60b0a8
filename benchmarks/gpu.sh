#!/usr/bin/env bash
# Everything worth knowing on a machine with a GPU, in seven minutes and without an install: is every
# op right, how fast is it beside its peers, how fast is a whole update beside stock PyTorch, where
# does the time go. Needs PyTorch >= 2.11 and Triton >= 3.6.
#
#   OUT=runs/gpu PYTHON=python3 bash benchmarks/gpu.sh             # seven minutes
#   OUT=runs/gpu PYTHON=python3 bash benchmarks/gpu.sh --quick     # half of that, with half of each time
#   OUT=runs/dry PYTHON=python3 bash benchmarks/gpu.sh --dry-run   # each step on a CPU, as small as can be
#
# Every step has a time of its own. What was measured when it is over is kept: rows go to CSV files in
# OUT/results as they come, and a short table comes last. The exit code is 1 if a step failed; that its
# time was over is no failure, but for a dry run.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
limit=420 share=1 dry=false
case ${1:-} in
    "") ;;
    --quick) limit=210 share=2 ;;
    --dry-run) dry=true ;;
    *) echo "usage: bash benchmarks/gpu.sh [--quick | --dry-run]" >&2; exit 2 ;;
esac
mkdir -p "$OUT"
# The checkout's own packages, whatever is installed; kernels compiled, not interpreted.
unset PYTHONSAFEPATH TRITON_INTERPRET
export PYTHONPATH=$PWD
failed=0

# Why a module cannot be imported, in a line; nothing if it can, or if no step will run.
obstacle() { ! $gpu && ! $dry || "$PYTHON" -c "import $1" 2>&1 | tail -n 1; }

skip() { echo "== $1: skipped: $2"; }

# step NAME SECONDS COMMAND...: run within the time, keep the output in OUT, show its end.
step() {
    local name=$1 seconds=$(($2 / share)) code=0 began=$SECONDS
    shift 2
    if ! $gpu && ! $dry; then
        skip "$name" "no GPU (--dry-run tries the steps on a CPU)"
        return
    fi
    local rest=$((limit - SECONDS))
    if $dry; then
        echo "== $name: has $seconds s on a GPU; here $*"
        # Of a machine that others use, too.
        seconds=300
    elif ((rest < seconds)); then
        seconds=$rest
    fi
    if ((seconds < 5)); then
        skip "$name" "the $limit s are over"
        return
    fi
    timeout --signal=INT --kill-after=5 "$seconds" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    # 124: the time is over; what was measured so far is kept.
    [[ $code == 0 || ($code == 124 && $dry == false) ]] || failed=1
    echo "== $name: exit $code after $((SECONDS - began)) of $seconds s, $OUT/$name.log"
    tail -n 12 "$OUT/$name.log"
}

code=0
"$PYTHON" - >"$OUT/machine.log" 2>&1 <<'EOF' || code=$?
import platform, torch, triton

print("Python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    print(f"GPU {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
EOF
tail -n 2 "$OUT/machine.log"
if [[ $code != 0 ]]; then
    echo "set PYTHON to one that has PyTorch (>= 2.11) and Triton (>= 3.6); $PYTHON has not" >&2
    exit 2
fi
gpu=false
if grep -q ^GPU "$OUT/machine.log"; then gpu=true; fi

bench=("$PYTHON" -m benchmarks)
# First those that compile nothing of their own, so that every shape has peers before one waits for
# torch.compile, which takes seconds a shape.
ready=(maect-fast eager official SDPA "SDPA flash" "SDPA efficient" "SDPA cuDNN" xformers flash-attn
    faiss-gpu linear_cross_entropy Liger)
compiled=(maect-fast torch.compile FlexAttention cut-cross-entropy)
if $dry; then
    small=(--device cpu --op info_nce --set quick --mode fwd)
    tiny=(--recipe digits --updates 2 device=cpu threads=1 batch_size=4 encoder.depth=2 frozen_blocks=1)
    check=(--device cpu --op info_nce)
    ops=("${small[@]}" --provider maect-fast eager)
    ops_compiled=("${small[@]}" --provider maect-fast torch.compile --minutes 0)
    l16=("${tiny[@]}") h14=("${tiny[@]}" --provider stock)
    gluon=(--device cpu --op masked_attention --set quick --mode fwd --provider maect-fast)
    trace=(--device cpu --op info_nce --shape B=64,N=64,D=64)
    tests=(tests/kernels/test_philox.py)
else
    check=()
    ops=(--provider "${ready[@]}")
    ops_compiled=(--provider "${compiled[@]}")
    l16=(--recipe l16 batch_size=256 --updates 10)
    h14=(--recipe h14 batch_size=128 --updates 10)
    gluon=(--op masked_attention --provider maect-fast "maect-fast Gluon")
    trace=()
    tests=(-m gpu)
    # The front end's tests need its packages.
    [[ -z $(obstacle timm) ]] || tests+=(tests/kernels)
fi
[[ -n $(obstacle xdist) ]] || tests+=(-n 8 --dist loadgroup)

step check 45 "${bench[@]}" check "${check[@]}"
step bench 100 "${bench[@]}" "${ops[@]}" --out "$OUT/results"
why=$(obstacle "maect_fast.training.engine, maect_fast.data, maect_fast.benchmarks.stock")
if [[ -n $why ]]; then
    skip step-l16 "$why"
    skip step-h14 "$why"
else
    step step-l16 45 "${bench[@]}" step "${l16[@]}" --out "$OUT/results"
    step step-h14 45 "${bench[@]}" step "${h14[@]}" --out "$OUT/results"
fi
step host 15 "${bench[@]}" host --out "$OUT/results"
step bench-compiled 30 "${bench[@]}" "${ops_compiled[@]}" --out "$OUT/results"
why=$(obstacle pytest)
if [[ -n $why ]]; then
    skip tests "$why"
else
    [[ -z $(obstacle xdist) ]] || echo "== tests: one after the other, pytest-xdist is not installed"
    step tests 45 "$PYTHON" -m pytest -q "${tests[@]}"
fi
step trace 20 "${bench[@]}" trace "${trace[@]}" --out "$OUT/trace"
# Last: no GPU has run these kernels, and a wrong barrier would hang until the time is over.
step gluon 60 "${bench[@]}" "${gluon[@]}" --out "$OUT/results"
for folder in "$OUT"/results/*/; do
    [[ -d $folder ]] && "$PYTHON" -m benchmarks table --summary "$folder"
done
exit $failed
