#!/bin/sh
# Everything that needs an NVIDIA GPU, as steps that can be run one by one and repeated: what is finished is kept.
#
#   scripts/gpu_check.sh [STEP ...]      default: tests determinism sanitizer ops memory steps generation study
#
# Runs the source as it lies here with $PYTHON (default python3), which must have torch for CUDA, triton and depthmix's
# dependencies with the extra test; nothing is installed. Records go to $RESULTS (default benchmarks/results).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$RESULTS"
"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu-check: torch finds no CUDA device here")'

bench() {
    name=$1
    shift
    "$PYTHON" -m depthmix bench "$@" --device cuda --out "$RESULTS/$name.json" --resume
}

step() {
    case $1 in
    tests) # the kernels, compiled for real, in fp32, bf16 and fp16; compiled models; CUDA graphs; then all other tests
        "$PYTHON" -m pytest -m kernels tests/kernels
        "$PYTHON" -m pytest -m "not slow"
        ;;
    determinism) # two processes, the same bits
        for turn in 1 2; do
            "$PYTHON" -c '
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
        done | sort | uniq -c | awk '{ print; if ($1 == 2) same = 1 } END { exit !same }'
        ;;
    sanitizer) # reads and writes outside of tensors, and races, of every kernel at small sizes
        for tool in memcheck racecheck; do
            compute-sanitizer --tool $tool --error-exitcode 1 \
                "$PYTHON" -m pytest -x -m kernels tests/kernels -k "not 36_blocks and not compiled and not graphs"
        done
        ;;
    ops) bench ops-gpu mgr-step mgr-step-window pool attnres-block-two-phase channel-gate sinkhorn hyper-step ;;
    memory) "$PYTHON" benchmarks/stream_memory.py --out "$RESULTS/stream-memory.json" ;;
    steps)
        for preset in S M L; do
            bench "training-step-$preset-gpu" training-step --preset $preset --dtype bf16 --compile --n 4 8 \
                --residuals prenorm attnres attnres-block:blocks=4 attnres-block:blocks=8 mhc mhc-lite:n_streams=4 \
                mgr-independent mgr-competitive --stream-memory store inversion replay
        done
        ;;
    generation) bench generation-gpu generation-step --preset S --dtype bf16 ;;
    study) # the nine rows of Table 1 at preset xs; needs $DEPTHMIX_TEXT, the folder of the text; ends within
        # $STUDY_SECONDS with everything saved, and goes on when it is called again
        status=0
        timeout "${STUDY_SECONDS:-540}" "$PYTHON" -m depthmix study studies/xs.toml --devices 0 || status=$?
        [ $status = 0 ] || [ $status = 75 ] || [ $status = 124 ] || exit $status
        ;;
    *)
        echo "gpu-check: no step named '$1'; steps: tests determinism sanitizer ops memory steps generation study" >&2
        exit 2
        ;;
    esac
}

[ $# -gt 0 ] || set -- tests determinism sanitizer ops memory steps generation
for name in "$@"; do
    echo "--- $name"
    step "$name"
done
