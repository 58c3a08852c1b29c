#!/usr/bin/env bash
# Trains on a Cloud TPU slice (v4, v5e), or evaluates there with RUN=evaluate: the same command on
# every host, again after each preemption.
#
#   TPU=robust ZONE=us-west4-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite BUCKET=my-bucket \
#     tools/launch/tpu_pod.sh --config configs/vit_s_cvst.py --workdir gs://my-bucket/runs/vit_s \
#     --config.data.dir=gs://my-bucket/tensorflow_datasets
#
# Google calls the Cloud TPU API, which this script uses, legacy: it only gets fixes and has no TPU7x.
# For v5p, v6e and v7x, use instance_groups.sh or gcluster.sh.
#
# Run it in tmux or similar, where `gcloud` is set up; it stays until the run is done. The hosts get
# the last commit of this checkout. Ctrl-C saves and stops the run on every host. With --delete, the
# slice is deleted when the run ends, however it ends; otherwise the last line says how to delete it.
# CAPACITY=spot (the default), on-demand or reserved sets how the slice is paid for, and QUEUED=yes
# requests it as a queued resource. The first start of a run stores the versions of all packages in
# the workdir, and later starts install them.
# BUCKET is mounted as ~/bucket by gcsfuse, for logs, versions and evaluations: RUN=evaluate takes
# --workdir ../bucket/runs/vit_s.
case $0 in */*) HERE=${0%/*} ;; *) HERE=. ;; esac
# shellcheck source-path=SCRIPTDIR
. "$HERE/pod.sh"

need TPU "the name of the slice"
need ZONE "such as us-west4-a"
need TYPE "the kind of slice, such as v5litepod-64"
need VERSION "the software of its hosts, such as v2-alpha-tpuv5-lite"
need BUCKET "the name of the bucket that the hosts mount"
BUCKET=${BUCKET#gs://}
[[ $TYPE != *7x* ]] ||
  stop "the Cloud TPU API has no TPU7x; use tools/launch/instance_groups.sh or gcluster.sh"
check_run
case ${CAPACITY:-spot} in
  spot) capacity=(--spot) ;;
  reserved) capacity=(--reserved) ;;
  on-demand) capacity=() ;;
  *) stop "CAPACITY=$CAPACITY is neither spot, on-demand nor reserved; write one of them" ;;
esac
case ${QUEUED:-no} in
  yes) queued=yes ;;
  no) queued='' ;;
  *) stop "QUEUED=$QUEUED is neither yes nor no; write one of them" ;;
esac
read_flags "$@"

tpu() { gcloud compute tpus tpu-vm "$1" "$TPU" --zone "$ZONE" "${@:2}"; }
request() { gcloud compute tpus queued-resources "$1" "$TPU" --zone "$ZONE" "${@:2}"; }
make() {
  if [[ $queued ]]; then
    request create --node-id "$TPU" --accelerator-type "$TYPE" --runtime-version "$VERSION" \
      ${capacity[@]+"${capacity[@]}"}
  else
    tpu create --accelerator-type "$TYPE" --version "$VERSION" ${capacity[@]+"${capacity[@]}"}
  fi
}
drop() { if [[ $queued ]]; then request delete --force --quiet; else tpu delete --quiet; fi; }
deletes() {
  local kind=tpu-vm force=''
  [[ -z $queued ]] || kind=queued-resources force=' --force'
  echo "gcloud compute tpus $kind delete $TPU --zone $ZONE$force"
}
on_every_host() {
  last=$FOLDER/last.0
  heard 0 tpu ssh --worker=all --command "$1"
}
first_host() { tpu ssh --worker=0 --command "$1"; }
copy() { gcloud compute tpus tpu-vm scp "$1" "$TPU": --zone "$ZONE" --worker=all; }
join() { echo ' --multihost'; } # JAX finds the others by itself

look() {
  if state=$(tpu describe --format='value(state)' 2>"$FOLDER/said"); then
    there=yes
  elif ! grep -qE "$ABSENT" "$FOLDER/said"; then
    failed
  elif [[ $queued ]]; then
    asked
  else
    state=none there=''
  fi
}
asked() { # the same of a request whose slice is not there
  if state=$(request describe --format='value(state.state)' 2>"$FOLDER/said"); then
    there=yes
    [[ $state != SUSPENDED ]] || state=FAILED # its slice is gone
  elif grep -qE "$ABSENT" "$FOLDER/said"; then
    state=none there=''
  else
    failed
  fi
}

run_until_done join
