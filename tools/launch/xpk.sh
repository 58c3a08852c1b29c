#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, by xpk: the same command in a container on every host.
#
#   CLUSTER=c ZONE=us-west4-a TYPE=v5litepod-64 IMAGE=my/image \
#     tools/launch/xpk.sh robust --config configs/vit_s_cvst.py --workdir /bucket/runs/vit_s
#
# The first argument names the workload. IMAGE has `pip install jaxrobust 'jax[tpu]'`, and the
# cluster a storage that is mounted everywhere, such as a bucket:
# `xpk storage attach ... --type=gcsfuse --bucket=B --mount-point=/bucket --auto-mount=true`.
set -euo pipefail
: "${CLUSTER:?}" "${ZONE:?}" "${TYPE:?such as v5litepod-64}" "${IMAGE:?}" "${1:?name of the workload}"

# 75: preempted and saved (jaxrobust.main); a checkpoint takes longer than the usual 30 s of grace.
xpk workload create --cluster "$CLUSTER" --zone "$ZONE" --workload "$1" \
  --tpu-type "$TYPE" --docker-image "$IMAGE" \
  --max-restarts 1000 --restart-on-exit-codes 75 --termination-grace-period-seconds 120 \
  --command "python -m jaxrobust.main --multihost $(printf '%q ' "${@:2}")"
