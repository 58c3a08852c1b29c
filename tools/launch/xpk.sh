#!/usr/bin/env bash
# Trains on TPU slices or GPUs of a GKE cluster with xpk, or evaluates there with RUN=evaluate: the same
# command in a container on every host, again after each preemption.
#
#   CLUSTER=c ZONE=us-west4-a TYPE=v5litepod-64 IMAGE=us-docker.pkg.dev/my-project/images/jaxrobust \
#     tools/launch/xpk.sh robust --config configs/vit_s_cvst.py --workdir /bucket/runs/vit_s \
#     --config.data.dir=/bucket/tensorflow_datasets
#
# The first argument names the workload. SLICES=2 trains on two such slices. For GPUs, NODES says how
# many hosts: TYPE=h100-80gb-8 NODES=2. The Dockerfile next to this script says how to build IMAGE.
# /bucket is a storage of the cluster, which every workload mounts:
#
#   xpk storage attach bucket --cluster c --zone us-west4-a --type gcsfuse --bucket my-bucket \
#     --size 1000 --mount-point /bucket --auto-mount true --readonly false \
#     --mount-options implicit-dirs,metadata-cache:ttl-secs:0 --no-prefetch-metadata
#
# `xpk workload delete --workload robust --cluster c --zone us-west4-a` stops it.
set -euo pipefail

stop() {
  echo "xpk.sh: $*" >&2
  exit 2
}
need() { [[ -n ${!1:-} ]] || stop "set $1, $2, in front of the command (tools/launch/README.md)"; }

need CLUSTER "the name of the cluster"
need ZONE "such as us-west4-a"
need TYPE "the kind of slice, such as v5litepod-64, or of GPUs, with NODES=2"
need IMAGE "the image that tools/launch/Dockerfile builds"
case ${RUN:-train} in
  train) module=jaxrobust.main ;;
  evaluate) module=jaxrobust.evaluate ;;
  *) stop "RUN=$RUN is neither train nor evaluate; write one of them" ;;
esac
[[ ${1:--} != -* ]] || stop "give the workload's name first, such as robust, then flags of $module"
[[ $# -gt 1 ]] || stop "give the flags of $module, such as --workdir /bucket/runs/vit_s"
[[ -z ${NODES:-} || -z ${SLICES:-} ]] ||
  stop "NODES counts hosts with GPUs and SLICES slices of TPUs; leave one of them out"
command -v xpk >/dev/null || stop "xpk is missing; pip install xpk"

join=--multihost # JAX finds the other hosts of TPUs by itself
machines=(--tpu-type "$TYPE" --num-slices "${SLICES:-1}")
if [[ ${NODES:-} ]]; then # in variables that xpk sets in the containers
  join="--coordinator_address \$JAX_COORDINATOR_ADDRESS:\$JAX_COORDINATOR_PORT"
  join+=" --num_processes \$NNODES --process_id \$NODE_RANK"
  machines=(--device-type "$TYPE" --num-nodes "$NODES")
fi
# 75: preempted and saved (jaxrobust.main); xpk itself restarts after signals (128 and above). A
# checkpoint takes longer than the usual 30 s of grace. `exec`: xpk's shell passes SIGTERM to what it
# has started, no further.
xpk workload create --cluster "$CLUSTER" --zone "$ZONE" --workload "$1" \
  "${machines[@]}" --docker-image "$IMAGE" \
  --max-restarts 1000 --restart-on-exit-codes 75 --termination-grace-period-seconds 120 \
  --command "exec python -m $module $join $(printf '%q ' "${@:2}")"
