#!/usr/bin/env bash
# Train on several GPUs of one or more machines:
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# Machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: $0 CONFIG GPUS [--work-dir DIR] [--resume] ..." >&2
    exit 2
fi
config=$1
gpus=$2
shift 2

# YAPF, which reads configs, writes its grammar when it is new; ranks would race.
python -c 'import yapf'

exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node-rank="${NODE_RANK:-0}" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" \
    --master-port="${PORT:-29500}" \
    --nproc-per-node="$gpus" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
