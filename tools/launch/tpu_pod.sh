#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or evaluates there with RUN=evaluate: the same command on every host,
# again after each preemption.
#
#   TPU=robust ZONE=us-west4-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite BUCKET=my-bucket \
#     tools/launch/tpu_pod.sh --config configs/vit_s_cvst.py --workdir ../bucket/runs/vit_s \
#     --config.data.dir=gs://my-bucket/tensorflow_datasets
#
# Run it in tmux or the like, where `gcloud` is set up; it stays until the run is done. The hosts get
# the last commit of this checkout. Ctrl-C stops the run on every host, saved. With --delete, the
# slice is deleted when the run ends, however it ends; else the last line says how to delete it.
# CAPACITY=spot (the default), on-demand or reserved says what the slice is paid as, and QUEUED=yes
# asks for it as a queued resource. The versions of all packages are kept in the workdir when a run
# first starts, and taken from there afterwards.
# BUCKET, mounted as ~/bucket by gcsfuse, should have a hierarchical namespace: only there is the
# renaming that completes a checkpoint atomic
# (gcloud storage buckets create --uniform-bucket-level-access --enable-hierarchical-namespace).
set -uo pipefail
WAIT=${WAIT:-60} # seconds
STEADY=$((10 * WAIT))
ATTEMPTS=10
# What waiting does not change, in the words of gcloud. A quota per minute is no such thing.
PERMANENT='quota|permission|denied|unauthor|unauthenticated|credential|log ?in|disabled|billing'
PERMANENT="$PERMANENT|not found|not exist|invalid|unrecognized|must be specified|not currently set"
TRANSIENT='capacity|per minute|unavailable|timed out|deadline|connecti|try again'

say() { echo "tpu_pod.sh: $*" >&2; }
stop() {
  say "$@"
  exit 2
}
need() { [[ -n ${!1:-} ]] || stop "set $1, $2, in front of the command (tools/launch/README.md)"; }

need TPU "the name of the slice"
need ZONE "such as us-west4-a"
need TYPE "the kind of slice, such as v5litepod-64"
need VERSION "the software of its hosts, such as v2-alpha-tpuv5-lite"
need BUCKET "the name of the bucket that the hosts mount"
BUCKET=${BUCKET#gs://}
case ${RUN:-train} in
  train) module=jaxrobust.main ;;
  evaluate) module=jaxrobust.evaluate ;;
  *) stop "RUN=$RUN is neither train nor evaluate; write one of them" ;;
esac
case ${CAPACITY:-spot} in
  spot | reserved) capacity=("--${CAPACITY:-spot}") ;;
  on-demand) capacity=() ;;
  *) stop "CAPACITY=$CAPACITY is neither spot, on-demand nor reserved; write one of them" ;;
esac
case ${QUEUED:-no} in
  yes) queued=yes ;;
  no) queued='' ;;
  *) stop "QUEUED=$QUEUED is neither yes nor no; write one of them" ;;
esac
delete='' command='' workdir='' before=''
for word in "$@"; do
  if [[ $word == --delete ]]; then delete=yes; else command+=" $(printf %q "$word")"; fi
  case $word in --workdir=*) workdir=${word#*=} ;; esac
  [[ $before != --workdir ]] || workdir=$word
  before=$word
done
frozen='' # on the hosts, from their home: the versions of the first start
[[ -z $workdir || $workdir == /* ]] || workdir=jaxrobust/$workdir
[[ -z $workdir ]] || frozen=$(printf %q "$workdir/versions.txt")
[[ $command ]] || stop "give the flags of $module, such as --workdir ../bucket/runs/vit_s"
command -v gcloud >/dev/null || stop "gcloud is missing; https://cloud.google.com/sdk has it"

cd "$(dirname "$0")/../.." || exit
if ! changes=$(git status --porcelain); then
  stop "$PWD is not a git checkout, from which the hosts would get the code; clone jaxrobust"
elif [[ $changes ]]; then
  stop "the hosts get the last commit, which is without these: commit, stash or remove them first" \
    $'\n'"$changes"
fi

FOLDER=$(mktemp -d)
there='' # whether the slice exists, for all that is known
finish() {
  code=$?
  rm -rf "$FOLDER"
  if [[ $there && $delete ]] && drop; then
    say "$TPU is deleted"
  elif [[ $there ]]; then
    kind=tpu-vm force=''
    [[ -z $queued ]] || kind=queued-resources force=' --force'
    say "$TPU still exists, which costs money; this deletes it:" \
      "gcloud compute tpus $kind delete $TPU --zone $ZONE$force"
  fi
  exit "$code"
}
trap finish EXIT

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
on_every_host() { tpu ssh --worker=all --command "$1"; }

# Waits after an error of gcloud, or ends where that would not help.
unknown=0
after_error() {
  if grep -qiE "$TRANSIENT" "$FOLDER/said"; then
    unknown=0
  elif grep -qiE "$PERMANENT" "$FOLDER/said"; then
    stop "gcloud says why $TPU cannot be had, and waiting will not change it; solve that first"
  elif ((++unknown == ATTEMPTS)); then
    stop "gcloud failed $ATTEMPTS times in a row as above; solve that first"
  fi
  sleep "$WAIT"
}
attempt() {
  "$1" 2>&1 | tee "$FOLDER/said" >&2 && return
  case $1 in
    make) there='' ;;
    drop) grep -q NOT_FOUND "$FOLDER/said" && return ;; # it is gone already
  esac
  after_error
}

# state: of the slice, none where it does not exist, unknown where gcloud failed.
look() {
  if state=$(tpu describe --format='value(state)' 2>"$FOLDER/said"); then
    there=yes
  elif ! grep -q NOT_FOUND "$FOLDER/said"; then
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
  elif grep -q NOT_FOUND "$FOLDER/said"; then
    state=none there=''
  else
    failed
  fi
}
failed() {
  state=unknown
  cat "$FOLDER/said" >&2
  after_error
}
slice() { # until it is ready
  while look && [[ $state != READY ]]; do
    case $state in
      none)
        there=yes # as soon as this is on its way
        attempt make
        ;;
      # It stays as a name, which has to go before a new slice can have it.
      PREEMPTED | TERMINATED | STOPPED | FAILED) attempt drop ;;
      unknown) ;;
      *) # on its way to one of these
        say "$TPU is $state; waiting"
        sleep "$WAIT"
        ;;
    esac
  done
  unknown=0
}

install() {
  git clone --quiet --bare --depth 1 "file://$PWD" "$FOLDER/jaxrobust.git" &&
    tar -czf "$FOLDER/jaxrobust.tgz" -C "$FOLDER" jaxrobust.git &&
    rm -rf "$FOLDER/jaxrobust.git" &&
    gcloud compute tpus tpu-vm scp "$FOLDER/jaxrobust.tgz" "$TPU": --zone "$ZONE" --worker=all ||
    return
  # Hosts must see each other's files at once, so gcsfuse may not remember what is there.
  on_every_host "
    set -e
    packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    command -v gcsfuse >/dev/null || {
      curl -fsS \$packages/doc/apt-key.gpg | sudo tee \$key >/dev/null
      echo \"deb [signed-by=\$key] \$packages gcsfuse-\$(lsb_release -cs) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
      sudo apt-get -qq -o DPkg::Lock::Timeout=600 install gcsfuse
    }
    mkdir -p bucket
    mountpoint -q bucket || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 $BUCKET bucket
    rm -rf jaxrobust.git && tar -xzf jaxrobust.tgz && git init -q jaxrobust
    git -C jaxrobust fetch -q --depth 1 ../jaxrobust.git HEAD
    git -C jaxrobust reset -q --hard FETCH_HEAD
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv
    [ -d venv ] || python3 -m uv venv -q --python 3.12 venv
    versions=()
    ${frozen:+[ ! -s $frozen ] || versions=(-c $frozen)}
    python3 -m uv pip install -q --python venv \${versions[@]+\"\${versions[@]}\"} \
      -e 'jaxrobust[tpu,gcs]'" || return
  # Once, so that a run that is preempted goes on under the same JAX, with the same bits.
  [[ -z $frozen ]] || tpu ssh --worker=0 --command "[ -s $frozen ] || {
    mkdir -p \"\$(dirname $frozen)\"
    python3 -m uv pip freeze -q --python venv --exclude-editable >$frozen.part &&
      mv $frozen.part $frozen
  }"
}

# Processes of a connection that was lost may still run; the others of their run stop with them.
process="^[^ ]*python[^ ]* -m ${module/./[.]}( |\$)"
ask() { # the command that sends a signal to them, and waits until they have saved
  echo "pkill -$1 -f '$process'; for _ in {1..120}; do pgrep -f '$process' >/dev/null || break;" \
    "sleep 1; done"
}
run() {
  on_every_host "if pgrep -f '$process' >/dev/null; then $(ask TERM); exit 75; fi
    cd jaxrobust && ../venv/bin/python -m $module --multihost$command"
}

trap '[[ ! $there ]] || on_every_host "$(ask INT)"; exit 130' INT
while slice; do
  started=$SECONDS
  install && run
  code=$?
  [[ $code == 0 ]] && exit          # done, whatever becomes of the slice
  [[ $code == 2 ]] || sleep "$WAIT" # until the state of a slice that goes tells of it
  case $code in
    75 | 143) continue ;; # preempted, saved or not training
    255) ((SECONDS - started > STEADY)) && continue ;; # ssh lost a run that went well
  esac
  look
  [[ $state == READY ]] && exit "$code"
done
