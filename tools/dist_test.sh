#!/usr/bin/env bash
# Evaluate on several GPUs of one or more machines:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# Machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [--out FILE.pkl] ..." >&2
    exit 2
fi
config=$1
checkpoint=$2
gpus=$3
shift 3

# YAPF, which reads configs, writes its grammar when it is new; ranks would race.
python -c 'import yapf'

exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node-rank="${NODE_RANK:-0}" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" \
    --master-port="${PORT:-29500}" \
    --nproc-per-node="$gpus" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
