#!/usr/bin/env bash
# Runs one stage of the GPU evidence from an uninstalled checkout that has only torch, numpy and pytest.
#
#   benchmarks/on_gpu.sh STAGE [--device cuda|cpu] [--out DIR]
#
# Rows go to DIR/STAGE.jsonl as they are measured (default: $OUT, else runs/on_gpu), the log to DIR/STAGE.log.
# `--device cpu` is a dry run of the same tests. Exit: 0 all passed, 2 wrong use, 3 no GPU, otherwise the stage failed.
set -euo pipefail

STAGES="correct"
LIMIT_S=480
PYTHON="${PYTHON:-python3}"

usage() {
    echo "usage: benchmarks/on_gpu.sh STAGE [--device cuda|cpu] [--out DIR]; stages: ${STAGES}" >&2
    exit 2
}

fail() {
    echo "on_gpu.sh: FAILED: $1" >&2
    exit "$2"
}

correct() {
    local status=0
    timeout --kill-after=10 "${LIMIT_S}" "${PYTHON}" -m pytest tests/ops tests/test_modules.py \
        -p benchmarks.pytest_rows --rows "${out}/correct.jsonl" --rows-device "${device}" \
        -p no:cacheprovider -q --durations=5 2>&1 | tee "${out}/correct.log" || status=$?
    [[ ${status} -ne 124 && ${status} -ne 137 ]] || fail "correct ran past ${LIMIT_S} s" "${status}"
    [[ ${status} -ne 5 ]] || fail "correct: no test of device ${device} passed" "${status}"
    [[ ${status} -eq 0 ]] || fail "correct: see ${out}/correct.log" "${status}"
}

[[ $# -ge 1 ]] || usage
stage="$1"
shift
device="cuda"
out="$(realpath -m "${OUT:-runs/on_gpu}")"
while [[ $# -gt 0 ]]; do
    [[ $# -ge 2 ]] || usage
    case "$1" in
        --device) device="$2" ;;
        --out) out="$(realpath -m "$2")" ;;
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
"${stage}"
echo "on_gpu.sh: ${stage} passed on ${device}; rows in ${out}/${stage}.jsonl"
