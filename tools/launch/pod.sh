# shellcheck shell=bash
# What tpu_pod.sh and instance_groups.sh share: hosts get the last commit of this checkout and run the
# same command, again after each preemption. A script that sources this file defines
#
#   look                sets `state`: READY; none; unknown, if gcloud failed; PREEMPTED and the like,
#                       if it has to be deleted first; any other to wait
#   make, drop          ask for what `look` found missing; delete what it found lost, or `drop all`
#   on_every_host CODE  runs it on all hosts, through `heard`, and sets `last` to the file of a line
#   copy FILE           puts it into the home of every host
#   first_host CODE     runs it on one of them
#   deletes             the command that deletes everything
set -uo pipefail
WAIT=${WAIT:-60} # seconds
STEADY=$((10 * WAIT))
ATTEMPTS=10
SAME=3 # ends with the same exit code and last line in a row, after which it gives up
# What waiting does not change, in the words of gcloud. A quota per minute is no such thing.
PERMANENT='quota|permission|denied|unauthor|unauthenticated|credential|log ?in|disabled|billing'
PERMANENT="$PERMANENT|not found|not exist|invalid|unrecognized|must be specified|not currently set"
TRANSIENT='capacity|per minute|unavailable|timed out|deadline|connecti|try again'
ABSENT="NOT_FOUND|The resource '.*' was not found" # not: "the accelerator ... was not found"

say() { echo "${0##*/}: $*" >&2; }
stop() {
  say "$@"
  exit 2
}
need() { [[ -n ${!1:-} ]] || stop "set $1, $2, in front of the command (tools/launch/README.md)"; }

# The arguments of the script: flags of the module, and --delete.
read_flags() {
  local word before='' workdir=''
  delete='' command=''
  for word in "$@"; do
    if [[ $word == --delete ]]; then delete=yes; else command+=" $(printf %q "$word")"; fi
    case $word in --workdir=*) workdir=${word#*=} ;; esac
    [[ $before != --workdir ]] || workdir=$word
    before=$word
  done
  frozen='' # on the hosts, from their home: the versions of the first start
  case $workdir in
    '' | /*) ;;
    gs://"$BUCKET"/*) # the run writes there itself
      workdir=bucket/${workdir#gs://"$BUCKET"/}
      [[ $module != jaxrobust.evaluate ]] ||
        stop "the hosts of an evaluation read each other's files; give --workdir ../$workdir"
      ;;
    gs://*) stop "--workdir $workdir is not in the bucket that the hosts mount, BUCKET=$BUCKET;" \
      "give one bucket" ;;
    *) workdir=jaxrobust/$workdir ;;
  esac
  [[ -z $workdir ]] || frozen=$(printf %q "$workdir/versions.txt")
  [[ $command ]] || stop "give the flags of $module, such as --workdir ../bucket/runs/vit_s"
  command -v gcloud >/dev/null || stop "gcloud is missing; install it from https://cloud.google.com/sdk"
}
case ${RUN:-train} in
  train) module=jaxrobust.main ;;
  evaluate) module=jaxrobust.evaluate ;;
  *) module='' ;;
esac
check_run() { [[ $module ]] || stop "RUN=$RUN is neither train nor evaluate; write one of them"; }

there='' before='' # whether a slice exists, for all that is known
last=/dev/null
finish() {
  code=$?
  rm -rf "$FOLDER"
  if [[ $there && $delete ]] && drop all; then
    say "$TPU is deleted"
  elif [[ $there ]]; then
    say "$TPU still exists, which costs money; this deletes it: $(deletes)"
  fi
  exit "$code"
}

# Waits after an error of gcloud, or ends where that would not help.
unknown=0
after_error() {
  if grep -qiE "$TRANSIENT" "$FOLDER/said"; then
    unknown=0
  elif grep -qiE "$PERMANENT" "$FOLDER/said"; then
    stop "$TPU cannot be created, as gcloud says above, and waiting will not change this; fix it first"
  elif ((++unknown == ATTEMPTS)); then
    stop "gcloud failed $ATTEMPTS times in a row, see above; fix this first"
  fi
  sleep "$WAIT"
}
attempt() {
  "$1" 2>&1 | tee "$FOLDER/said" >&2 && return
  case $1 in
    make) [[ -e $FOLDER/made ]] || there=$before ;; # made: a part of it
    drop) grep -qE "$ABSENT" "$FOLDER/said" && return ;; # it is gone already
  esac
  after_error
}
failed() { # gcloud, which `look` asked
  state=unknown
  cat "$FOLDER/said" >&2
  after_error
}
slice() { # until it is ready
  while look && [[ $state != READY ]]; do
    case $state in
      none)
        before=$there there=yes # as soon as this is on its way
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

# heard NUMBER COMMAND...: shows its output, and stores the last line for `same`.
heard() { "${@:2}" 2>&1 | sed -u -n -e p -e "\$w $FOLDER/last.$1" >&2; }

install() {
  git clone --quiet --bare --depth 1 "file://$PWD" "$FOLDER/jaxrobust.git" &&
    tar -czf "$FOLDER/jaxrobust.tgz" -C "$FOLDER" jaxrobust.git &&
    rm -rf "$FOLDER/jaxrobust.git" && copy "$FOLDER/jaxrobust.tgz" || return
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
    python3 -m pip --version >/dev/null 2>&1 ||
      sudo apt-get -qq -o DPkg::Lock::Timeout=600 install python3-pip
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
  [[ -z $frozen ]] || first_host "[ -s $frozen ] || {
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
# What a host says goes into the bucket once a minute, so that it outlives the host.
run() {
  on_every_host "if pgrep -f '$process' >/dev/null; then $(ask TERM); exit 75; fi
    log=\$HOME/bucket/logs/$TPU/$(date +%Y%m%d-%H%M%S)-\$(hostname).log
    mkdir -p \"\${log%/*}\"
    cd jaxrobust || exit
    while sleep 60; do cp ../run.log \"\$log\"; done >/dev/null 2>&1 &
    PYTHONUNBUFFERED=1 ../venv/bin/python -m $module$1$command 2>&1 | tee -p ../run.log
    code=\${PIPESTATUS[0]}
    kill \$!
    cp ../run.log \"\$log\"
    exit \$code"
}

# Whether the run has ended like this for the SAMEth time in a row.
kind='' times=0
same() {
  local new
  new="$code $(cat "$last")"
  [[ $new == "$kind" ]] || kind=$new times=0
  ((++times == SAME)) || return
  say "the run ended $SAME times in a row with exit code $code and the same last line, without" \
    "progress; fix this first: ${kind#* }"
}

# run_until_done JOIN: the flags by which the processes of the hosts find each other.
run_until_done() {
  local changes started
  cd "$HERE/../.." || exit
  if ! changes=$(git status --porcelain); then
    stop "$PWD is not a git checkout, and the hosts get their code from one; clone jaxrobust"
  elif [[ $changes ]]; then
    stop "the hosts get the last commit, which lacks these changes: commit, stash or remove them" \
      "first"$'\n'"$changes"
  fi
  FOLDER=$(mktemp -d)
  trap finish EXIT
  trap '[[ ! $there ]] || on_every_host "$(ask INT)"; exit 130' INT
  while slice; do
    started=$SECONDS
    install && run "$($1)"
    code=$?
    [[ $code == 0 ]] && exit          # done, whatever becomes of the slice
    [[ $code == 2 ]] || sleep "$WAIT" # until the state of a slice that goes tells of it
    look
    [[ $state == READY ]] || continue # not the run's fault
    case $code in
      75 | 143) ;;                                              # preempted, saved or not training
      134 | 137 | 139) ;;                                       # a crash
      255) ((SECONDS - started > STEADY)) || exit "$code" ;; # ssh lost a run that went well
      *) exit "$code" ;;
    esac
    ! same || exit "$code"
  done
}
