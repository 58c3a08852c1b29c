#!/usr/bin/env bash
# Trains on TPU slices or GPUs of a GKE cluster with Google's Cluster Toolkit, or evaluates there with
# RUN=evaluate: the same command in a container on every host, again after each preemption.
#
#   CLUSTER=c ZONE=us-central1-c TYPE=tpu7x TOPOLOGY=4x4x4 BUCKET=my-bucket \
#     IMAGE=us-docker.pkg.dev/my-project/images/jaxrobust \
#     tools/launch/gcluster.sh robust --config configs/vit_s_cvst.py --workdir /bucket/runs/vit_s \
#     --config.data.dir=/bucket/tensorflow_datasets
#
# The first argument names the job. TOPOLOGY may be left out if TYPE says how many chips, such as
# v6e-64, and SLICES=2 trains on two such slices. For GPUs, NODES says how many hosts:
# TYPE=h100-80gb-8 NODES=2. The bucket is mounted at /bucket; the Dockerfile next to it says
# how to build IMAGE. `gcluster job logs robust --cluster c --location us-central1-c` shows it,
# `gcluster job cancel robust ...` stops it.
set -euo pipefail

stop() {
  echo "gcluster.sh: $*" >&2
  exit 2
}
need() { [[ -n ${!1:-} ]] || stop "set $1, $2, in front of the command (tools/launch/README.md)"; }

need CLUSTER "the name of the cluster"
need ZONE "such as us-central1-c"
need TYPE "the kind of slice, such as v6e-64, or tpu7x with TOPOLOGY=4x4x4"
need IMAGE "the image that tools/launch/Dockerfile builds"
need BUCKET "the bucket that is mounted at /bucket"
case ${RUN:-train} in
  train) module=jaxrobust.main ;;
  evaluate) module=jaxrobust.evaluate ;;
  *) stop "RUN=$RUN is neither train nor evaluate; write one of them" ;;
esac
[[ $TYPE == *-* || -n ${TOPOLOGY:-} ]] || stop "TYPE=$TYPE has no size; set TOPOLOGY too, such as 4x4x4"
[[ ${1:--} != -* ]] || stop "give the job's name first, such as robust, then flags of $module"
[[ $# -gt 1 ]] || stop "give the flags of $module, such as --workdir /bucket/runs/vit_s"
[[ -z ${NODES:-} || -z ${SLICES:-} ]] ||
  stop "NODES counts hosts with GPUs and SLICES slices of TPUs; leave one of them out"
command -v gcluster >/dev/null ||
  stop "gcluster is missing; install Cluster Toolkit (cloud.google.com/cluster-toolkit/docs)"

join=--multihost # JAX finds the other hosts of TPUs by itself
machines=(${TOPOLOGY:+--topology "$TOPOLOGY"} --num-slices "${SLICES:-1}")
if [[ ${NODES:-} ]]; then # the first pod of the JobSet, as Kubernetes names it
  join="--coordinator_address $1-main-job-0-0.$1:8476 --num_processes $NODES"
  join+=" --process_id \$JOB_COMPLETION_INDEX"
  machines=(--num-nodes "$NODES")
fi
# 75: preempted and saved (jaxrobust.main); 143: ended by SIGTERM. A checkpoint takes longer than the
# usual 30 s of grace. `exec`: the container's shell passes SIGTERM to what it has started, no further.
gcluster job submit --cluster "$CLUSTER" --location "$ZONE" --name "$1" \
  --compute-type "$TYPE" "${machines[@]}" --image "$IMAGE" \
  --mount "gs://$BUCKET;/bucket;rw;options=implicit-dirs,metadata-cache:ttl-secs:0" \
  --restarts 1000 --restart-on-exit-codes 75,143 --grace-period 120s \
  --command "exec python -m $module $join $(printf '%q ' "${@:2}")"
