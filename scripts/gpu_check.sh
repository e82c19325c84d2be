#!/bin/sh
# Everything that needs an NVIDIA GPU, as steps that can be run one by one and repeated: what is finished is kept.
#
#   scripts/gpu_check.sh [STEP ...]      default: all but study, the most valuable first
#
# Runs the source as it lies here with $PYTHON (default python3), which must have torch for CUDA, triton and depthmix's
# dependencies with the extra test; nothing is installed. Records go to $RESULTS (default benchmarks/results), the names
# of tests that have passed to $RESULTS/gpu-check. With $SECONDS_LEFT set, what is running then is stopped and the exit
# status is 75: the same command goes on from there. $JOBS (default 8) tests run side by side.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
STEPS="kernels ops tests determinism memory steps generation plots sanitizer"
JOBS=${JOBS:-8}
until=${SECONDS_LEFT:+$(($(date +%s) + SECONDS_LEFT))}
mkdir -p "$RESULTS"
"$PYTHON" -c '
import sys
try:
    import torch
except ImportError:
    sys.exit(f"gpu-check: {sys.executable} has no torch; name a Python that has one for CUDA in $PYTHON")
sys.exit(0 if torch.cuda.is_available() else "gpu-check: torch finds no CUDA device here")'

no_time() {
    echo "gpu-check: no time left; the same command goes on from here" >&2
    exit 75
}

run() { # a command, for as long as there is time
    left=0 # timeout takes 0 for no limit
    if [ -n "$until" ]; then
        left=$((until - $(date +%s)))
        [ $left -gt 0 ] || no_time
    fi
    status=0
    timeout --signal INT --kill-after 20 $left "$@" || status=$?
    case $status in
    0) ;;
    124 | 137) no_time ;;
    *) exit $status ;;
    esac
}

bench() {
    name=$1
    shift
    run "$PYTHON" -m depthmix bench "$@" --device cuda --out "$RESULTS/$name.json" --resume
}

tests() { # those that have passed with these sources are left out
    name=$1
    shift
    run "$@" --kept "$RESULTS/gpu-check/$name.txt"
}

digest() { # of the gradients of one step of several models
    run "$PYTHON" -c '
import hashlib, torch
from depthmix import GPT, GPTConfig
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    for residual in ("mgr-competitive", "mgr-independent", "attnres", "attnres-block:blocks=4", "highway", "review"):
        model = GPT(GPTConfig(512, 8, 1280, 10, 256, residual=residual), seed=0).to("cuda", dtype)
        ids = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(0)).cuda()
        model(ids, ids.roll(1, 1))[1].backward()
        for name, p in model.named_parameters():
            if "embed" not in name:  # torch adds the rows of an embedding in any order
                digest.update(p.grad.float().cpu().numpy().tobytes())
print(digest.hexdigest())'
}

train_bench() { # one record of the rows of Table 1
    record=training-step-$1-gpu
    shift
    bench "$record" training-step "$@" --dtype bf16 --compile --n 4 8 --stream-memory replay store inversion \
        --residuals prenorm mgr-competitive mgr-independent attnres-block:blocks=4 attnres attnres-block:blocks=8 \
        mhc-lite:n_streams=4 mhc:n_streams=4
}

step() {
    case $1 in
    kernels) # compiled for real, in fp32, bf16 and fp16; compiled models; CUDA graphs
        tests kernels env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n "$JOBS" -m kernels tests/kernels
        ;;
    tests) # all others
        tests tests env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n "$JOBS" --dist loadfile -m "not slow"
        ;;
    determinism) # two processes, the same bits
        first=$(digest)
        second=$(digest)
        [ "$first" = "$second" ] || {
            echo "gpu-check: the gradients of two runs are not the same bits: $first, $second" >&2
            exit 1
        }
        ;;
    sanitizer) # reads and writes outside of tensors, and races, of every kernel at small sizes
        for tool in memcheck racecheck; do
            tests $tool compute-sanitizer --tool $tool --error-exitcode 1 \
                "$PYTHON" -m pytest -x -m kernels tests/kernels -k "not 36_blocks and not compiled and not graphs"
        done
        ;;
    ops) bench ops-gpu mgr-step mgr-step-window pool attnres-block-two-phase channel-gate sinkhorn hyper-step ;;
    memory) run "$PYTHON" benchmarks/stream_memory.py --out "$RESULTS/stream-memory.json" ;;
    steps) # the paper's sizes, then wide ones of few blocks
        for preset in S M L; do
            train_bench $preset --preset $preset
        done
        train_bench wide --preset L --layers 8 --width 1280 2048 4096 --sequences 8
        ;;
    plots) # of what the steps before have measured
        "$PYTHON" -m depthmix bench --from "$RESULTS"/training-step-*-gpu.json --plots "$RESULTS/plots-steps"
        "$PYTHON" -m depthmix bench --from "$RESULTS/ops-gpu.json" --plots "$RESULTS/plots-ops"
        ;;
    generation) bench generation-gpu generation-step --preset S --dtype bf16 ;;
    study) # the nine rows of Table 1 at preset xs; needs $DEPTHMIX_TEXT, the folder of the text
        # What has ended is in results/xs, and a copy of it where the other records are, however this ends.
        trap 'if [ -d results/xs ]; then mkdir -p "$RESULTS/xs" && cp results/xs/*.jsonl "$RESULTS/xs/"; fi' EXIT
        run "$PYTHON" -m depthmix study studies/xs.toml --devices 0
        ;;
    *)
        echo "gpu-check: no step named '$1'; steps: $STEPS study" >&2
        exit 2
        ;;
    esac
}

[ $# -gt 0 ] || set -- $STEPS
for name in "$@"; do
    echo "--- $name"
    step "$name"
done
