#!/usr/bin/env bash
# Runs one stage of the GPU evidence from an uninstalled checkout that has only torch, triton, numpy and pytest.
#
#   benchmarks/on_gpu.sh STAGE [--device cuda|cpu] [--out DIR] [--commit HASH] [-- OPTION...]
#
#   correct   the tests of operations and modules, float32 with torch's TF32 switch off and on
#   sanitize  compute-sanitizer's memcheck, racecheck and initcheck over every kernel
#   bench     our kernels against eager, compiled, SDPA, FlexAttention and ffpa-attn
#   train     a training step and a short training without blocks, with naive and with fast ones
#   ablate    plans of the Hopper kernels (clusters, widths of tiles, slots), each checked, then timed; after correct
#
# Each takes at most 8 minutes. Rows go to DIR/STAGE.jsonl as they are measured (default: $OUT, else runs/on_gpu), the
# log to DIR/STAGE.log. `--device cpu` is a dry run of the same code, reduced, kernels in Triton's interpreter.
# `--commit` records the commit of a copy without git; what follows `--` goes to the stage's own program. Exit: 0 all
# passed, 2 wrong use, 3 no GPU, 5 no test passed, 124 out of time, otherwise the stage failed.
set -euo pipefail

STAGES="correct sanitize bench train ablate"
PYTHON="${PYTHON:-python3}"

usage() {
    echo "usage: benchmarks/on_gpu.sh STAGE [--device cuda|cpu] [--out DIR] [--commit HASH] [-- OPTION...];" \
        "stages: ${STAGES}" >&2
    exit 2
}

fail() {
    echo "on_gpu.sh: FAILED: $1" >&2
    exit "$2"
}

[[ $# -ge 1 ]] || usage
stage="$1"
shift
device="cuda"
out="$(realpath -m "${OUT:-runs/on_gpu}")"
options=()
while [[ $# -gt 0 ]]; do
    if [[ $1 == "--" ]]; then
        shift
        options+=("$@")
        break
    fi
    [[ $# -ge 2 ]] || usage
    case "$1" in
        --device) device="$2" ;;
        --out) out="$(realpath -m "$2")" ;;
        --commit) options+=(--commit "$2") ;;
        *) usage ;;
    esac
    shift 2
done
[[ " ${STAGES} " == *" ${stage} "* ]] || usage
[[ ${device} == "cuda" || ${device} == "cpu" ]] || usage

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1
if [[ ${device} == "cuda" ]]; then
    "${PYTHON}" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "torch sees no GPU here (--device cpu is a dry run)" 3
fi
mkdir -p "${out}"
# What an interpreter verifies says nothing of this machine: it stays out of the user's cache.
[[ ${device} == "cuda" ]] || export NLKERNELS_CACHE_DIR="${out}/cache"

declare -A modules=([correct]=correct [sanitize]=sanitize [bench]=gpu_bench [train]=gpu_train [ablate]=ablate)
status=0
"${PYTHON}" -m "benchmarks.${modules[${stage}]}" --device "${device}" --out "${out}" "${options[@]}" 2>&1 |
    tee "${out}/${stage}.log" || status=$?
[[ ${status} -ne 124 ]] || fail "${stage} ran out of time, rows so far are in ${out}/${stage}.jsonl" 124
[[ ${status} -ne 5 ]] || fail "${stage}: nothing of device ${device} passed" 5
[[ ${status} -eq 0 ]] || fail "${stage}: see ${out}/${stage}.log" "${status}"
echo "on_gpu.sh: ${stage} passed on ${device}; rows in ${out}/${stage}.jsonl"
