#!/usr/bin/env bash
# What can only be checked on an NVIDIA GPU: the tests marked `gpu`, with compiled instead of
# interpreted kernels, and the speed of kernels, of a layer, of a whole model shaped like Llama-3 8B and of
# the demo models, each beside dense. Meant to take under ten minutes; not timed on a GPU yet.
#
#   OUT=folder scripts/gpu_check.sh            # records go to OUT, else to benchmarks/records
#   PYTHON=python3 scripts/gpu_check.sh        # an interpreter that has the dependencies already
#
# Installs nothing: with neither PYTHON nor .venv the `python3` on the path is used as it is.
# Without a GPU it says so and ends well.
set -euo pipefail

if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "gpu_check: no NVIDIA GPU here, nothing to check"
  exit 0
fi

out=${OUT:-$(dirname "${BASH_SOURCE[0]}")/../benchmarks/records}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [[ -z $python ]]; then
  if [[ -x .venv/bin/python ]]; then python=$PWD/.venv/bin/python; else python=python3; fi
fi
export PYTHONPATH=$PWD:$PWD/kernels TRITON_INTERPRET=0 HF_HUB_OFFLINE=1
"$python" - <<'PY'
import torch

if not torch.cuda.is_available():
    raise SystemExit(f"gpu_check: torch {torch.__version__} sees no GPU; install its CUDA build")
print(f"gpu_check: {torch.cuda.get_device_name()}, torch {torch.__version__}")
PY

status=0
"$python" -m pytest -m gpu --junitxml "$out/gpu_tests.xml" || status=$?
if [[ $status == 5 ]]; then status=0; fi # no test is marked gpu

"$python" experiments/gpu_kernels.py "$out" || status=1
"$python" experiments/gpu_decode.py "$out" || status=1
"$python" -m moefy bench --layer 4096,11008,64,16 --dtype bfloat16 \
  --out "$out/gpu_bench_layer.json"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for config in moefy/demo/*/config.json; do
  [[ -f $config ]] || continue
  model=$(basename "$(dirname "$config")")
  "$python" -m moefy convert "$(dirname "$config")" "$work/$model" --recipe fast --quiet
  "$python" -m moefy bench "$work/$model" --out "$out/gpu_bench_$model.json"
done
echo "gpu_check: records are in $out"
exit "$status"
