#!/usr/bin/env bash
# Tests, times, tunes and trains on one NVIDIA GPU, and keeps the output of every step.
#
#   benchmarks/on_a_gpu.sh [FOLDER] [tests] [benchmarks] [engines] [tune]
#
# FOLDER (default: $OUT, or gpu-results) gets summary.txt and, in results.tar.gz, the output of each step and the
# tables. Both are written again after every step, so that a run that is cut short leaves its results. Without names of
# parts, all of them run, in this order. A step that fails or exceeds its time does not stop the run.
#
# Environment variables:
#   SECONDS_IN_ALL  time for all steps, default: 570. Steps that do not fit are cut short, then skipped.
#   ORIGINAL        a checkout of microsoft/Focal-Transformer, which is then measured too
#   PYTHON          default: python3
#   DRY_RUN=1       runs all steps of the chosen parts on a CPU, on tiny sizes, to check the commands

set -u -o pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
PYTHON=${PYTHON:-python3} DRY_RUN=${DRY_RUN:-} deadline=${SECONDS_IN_ALL:-570}

folder=${OUT:-gpu-results} parts=()
for argument; do
    case $argument in
        tests | benchmarks | engines | tune) parts+=("$argument") ;;
        -*) echo "usage: $0 [FOLDER] [tests] [benchmarks] [engines] [tune]" >&2; exit 2 ;;
        *) folder=$argument ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(tests benchmarks engines tune)
mkdir -p "$folder" || exit
folder=$(cd "$folder" && pwd)
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
: >"$folder/summary.txt"

# step NAME SECONDS COMMAND...: runs the command for at most so many seconds, with its output in NAME.log.
step() {
    local name=$1 limit=$2 status began=$SECONDS left=$((deadline - SECONDS))
    shift 2
    [ "$left" -ge "$limit" ] || limit=$left
    if [ "$limit" -lt 15 ]; then
        echo "$name: skipped, no time left" | tee -a "$folder/summary.txt"
        return
    fi
    { echo "$*"; timeout --kill-after=10 "$limit" "$@"; } >"$results/$name.log" 2>&1
    status=$?
    case $status in
        0) status=ok ;;
        124 | 137) status="cut short after $limit s" ;;
        *) status="failed ($status)" ;;
    esac
    {
        echo "$name: $status, $((SECONDS - began)) s"
        tail -n 3 "$results/$name.log" | cut -c1-300 | sed 's/^/    /'
    } | tee -a "$folder/summary.txt"
    tar -czf "$folder/results.tar.gz" -C "$results" .
}

device=cuda processes=8 seconds=2 sizes="224 448 896" passes="inference training"
launches=() tuned=(--sizes 224) selection=()
if [ "$DRY_RUN" ]; then
    device=cpu processes=1 seconds=0.1 sizes=224 passes=inference
    export TRITON_INTERPRET=1
    launches=(--sizes 7 --batch-size 1 --dtype float32 --device cpu)
    tuned=("${launches[@]}")
    selection=(-k "patch_2 or fake or every_block or share_a_graph")
fi
# By default, each of the processes would start as many compilers as there are cores.
tests=(env TORCHINDUCTOR_COMPILE_THREADS=2 "$PYTHON" -m pytest -q --tb=short -p no:cacheprovider -n "$processes")
time_models=("$PYTHON" benchmarks/throughput.py --device "$device" --seconds "$seconds" --task $passes --sizes $sizes)

step machine 60 "$PYTHON" -c '
import torch, transformers, focal_hf
print(focal_hf.__file__, torch.__version__, transformers.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
'

for part in "${parts[@]}"; do
    case $part in
        tests)
            step test_triton 170 "${tests[@]}" tests/test_triton.py "${selection[@]}"
            step test_cuda 150 "${tests[@]}" tests/test_cuda.py "${selection[@]}"
            step test_golden 90 "${tests[@]}" --device "$device" tests/test_golden.py "${selection[@]}"
            step test_model 120 "${tests[@]}" --device "$device" tests/test_model.py tests/test_attention.py \
                "${selection[@]}"
            step test_export 120 "${tests[@]}" --device "$device" tests/test_export.py "${selection[@]}"
            ;;
        benchmarks)
            step bfloat16 220 "${time_models[@]}" --dtype bfloat16 --attention focal topk --peer sdpa frozen swin focalnet \
                --output "$results/bfloat16"
            step kernels 60 "$PYTHON" benchmarks/triton_attention.py "${launches[@]}"
            step bfloat16_compiled 240 "${time_models[@]}" --dtype bfloat16 --peer sdpa swin --compile \
                --output "$results/bfloat16_compiled"
            step float32 150 "${time_models[@]}" --dtype float32 --peer sdpa swin --output "$results/float32"
            step topk_compiled 240 "${time_models[@]}" --dtype bfloat16 --attention topk --peer sdpa swin --compile \
                --output "$results/topk_compiled"
            step float32_compiled 240 "${time_models[@]}" --dtype float32 --peer sdpa swin --compile \
                --output "$results/float32_compiled"
            step profile 60 "${time_models[@]}" --dtype bfloat16 --peer sdpa swin --profile --output "$results/profile"
            [ -z "${ORIGINAL:-}" ] || step original 120 "${time_models[@]}" --dtype bfloat16 --attention focal topk \
                --peer --original "$ORIGINAL" --output "$results/original"
            ;;
        engines)
            step engines 200 "${tests[@]}" tests/test_engines.py
            ;;
        tune)
            step tune 540 "$PYTHON" benchmarks/triton_attention.py --tune "${tuned[@]}"
            ;;
    esac
done
echo "Results: $folder/summary.txt, $folder/results.tar.gz"
