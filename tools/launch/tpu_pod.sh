#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: the same command on every host, again after each preemption.
#
#   TPU=robust ZONE=us-west4-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite BUCKET=my-bucket \
#     tools/launch/tpu_pod.sh --config configs/vit_s_cvst.py --workdir ../bucket/runs/vit_s
#
# Run it from the checkout, in tmux or the like, where `gcloud` is set up; it stays until the run is
# done. The code is the last commit. Ctrl-C stops the run on every host, saved.
# BUCKET, mounted as ~/bucket by gcsfuse, should have a hierarchical namespace: only there is the
# renaming that completes a checkpoint atomic
# (gcloud storage buckets create --uniform-bucket-level-access --enable-hierarchical-namespace).
set -uo pipefail
: "${TPU:?name of the slice}" "${ZONE:?}" "${TYPE:?such as v5litepod-64}" "${VERSION:?}" "${BUCKET:?}"
WAIT=${WAIT:-60} # seconds
FOLDER=$(mktemp -d)

tpu() { gcloud compute tpus tpu-vm "$1" "$TPU" --zone "$ZONE" "${@:2}"; }
on_every_host() { tpu ssh --worker=all --command "$1"; }

# What was preempted stays as a name that has to go before a new slice can have it.
ready() { [[ "$(tpu describe --format='value(state)' 2>/dev/null)" == READY ]]; }
create() {
  ready && return
  tpu delete --quiet 2>/dev/null
  until tpu create --accelerator-type "$TYPE" --version "$VERSION" --spot; do
    sleep "$WAIT" # none is free
  done
}

install() {
  git bundle create --quiet "$FOLDER/jaxrobust.bundle" HEAD &&
    gcloud compute tpus tpu-vm scp "$FOLDER/jaxrobust.bundle" "$TPU": --zone "$ZONE" \
      --worker=all || return
  # Hosts must see each other's files at once, so gcsfuse may not remember what is there.
  on_every_host "
    set -e
    command -v gcsfuse || { echo 'gcsfuse is missing: install it, or use an image with it'; exit 2; }
    mkdir -p bucket
    mountpoint -q bucket || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 $BUCKET bucket
    [ -d jaxrobust ] || git clone -q jaxrobust.bundle jaxrobust
    git -C jaxrobust pull -q --ff-only ../jaxrobust.bundle HEAD
    pip install -q uv
    [ -d venv ] || python3 -m uv venv -q --python 3.12 venv
    python3 -m uv pip install -q --python venv -e jaxrobust 'jax[tpu]'"
}

trap 'on_every_host "pkill -INT -f [j]axrobust.main"; exit 130' INT
while true; do
  create
  install &&
    on_every_host "cd jaxrobust && ../venv/bin/python -m jaxrobust.main --multihost $(printf '%q ' "$@")"
  code=$?
  [[ $code == 0 ]] && exit 0 # done, whatever becomes of the slice
  case $code in # 75, 143: preempted, saved or not training; 255: ssh lost a host, or that is all
    75 | 143 | 255) sleep "$WAIT" ;; # until the state of a slice that goes tells of it
  esac
  [[ $code == 75 || $code == 143 ]] || { ready && exit "$code"; }
done
