#!/usr/bin/env bash
# Trains on TPU slices (v5p, v6e, v7x) that are managed instance groups of Compute Engine, or
# evaluates there with RUN=evaluate: the same command on every host, again after each preemption.
#
#   TPU=robust ZONE=us-east5-b TYPE=v6e TOPOLOGY=8x8 BUCKET=my-bucket \
#     tools/launch/instance_groups.sh --config configs/vit_s_cvst.py \
#     --workdir gs://my-bucket/runs/vit_s --config.data.dir=gs://my-bucket/tensorflow_datasets
#
# SLICES=2 trains on two such slices, robust-0 and robust-1. CAPACITY=spot (the default), on-demand
# or reserved, with RESERVATION=name, sets how they are paid for. The rest is as in tpu_pod.sh.
# flags.tsv names the page that documents each flag of gcloud.
case $0 in */*) HERE=${0%/*} ;; *) HERE=. ;; esac
# shellcheck source-path=SCRIPTDIR
. "$HERE/pod.sh"

need TPU "the name of the groups"
need ZONE "such as us-east5-b"
need TYPE "the TPU: v5p, v6e or v7x"
need TOPOLOGY "the shape of a slice, such as 8x8 (v6e) or 4x4x4 (v5p, v7x)"
need BUCKET "the name of the bucket that the hosts mount"
BUCKET=${BUCKET#gs://}
SLICES=${SLICES:-1} CAPACITY=${CAPACITY:-spot} region=${ZONE%-*}
old=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
case $TYPE in
  v5p) machine=ct5p-hightpu-4t image=$old disk=pd-balanced shape=4x4x4 ;;
  v6e) machine=ct6e-standard-4t image=$old disk=hyperdisk-balanced shape=8x8 ;;
  v7x)
    machine=tpu7x-standard-4t image=ubuntu-accel-2404-amd64-tpu-tpu7x
    disk=hyperdisk-balanced shape=4x4x4
    ;;
  *) stop "TYPE=$TYPE is neither v5p, v6e nor v7x; write one of them (v4, v5e: tpu_pod.sh)" ;;
esac
sides=$(((${#shape} + 1) / 2)) chips=0
[[ ! $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){$((sides - 1))}$ ]] || chips=$((${TOPOLOGY//x/*}))
((chips && chips % 4 == 0)) ||
  stop "TOPOLOGY=$TOPOLOGY is not the shape of a $TYPE slice; write $sides sides, such as $shape"
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || stop "SLICES=$SLICES is not a number of slices; write one"
size=$((chips / 4)) # hosts of a slice, with four chips each
check_run
case $CAPACITY in
  spot) capacity=(--provisioning-model SPOT --instance-termination-action STOP) ;;
  on-demand) capacity=() ;;
  reserved)
    need RESERVATION "the name of the reservation"
    capacity=(--provisioning-model RESERVATION_BOUND)
    capacity+=(--reservation-affinity specific --reservation "$RESERVATION")
    ;;
  *) stop "CAPACITY=$CAPACITY is neither spot, on-demand nor reserved; write one of them" ;;
esac
read_flags "$@"

policy=jaxrobust-$TOPOLOGY template=$TPU-$TYPE-$CAPACITY
group() { gcloud compute instance-groups managed "$1" "$TPU-$2" --zone "$ZONE" "${@:3}"; }
there_is() { gcloud compute "$1" describe "$2" --region "$region" >"$FOLDER/described" 2>&1; }
make() {
  local project path number slice=()
  project=$(gcloud config get-value project) || return
  path=projects/$project/regions/$region
  if ((size > 1)); then # hosts that are one slice come together, or not at all
    there_is resource-policies "$policy" ||
      gcloud compute resource-policies create workload-policy "$policy" --region "$region" \
        --type HIGH_THROUGHPUT --accelerator-topology "$TOPOLOGY" \
        --accelerator-topology-mode AUTO_CONNECT || return
    slice=(--target-size-policy-mode bulk --workload-policy "$path/resourcePolicies/$policy")
  fi
  there_is instance-templates "$template" ||
    gcloud compute instance-templates create "$template" --instance-template-region "$region" \
      --machine-type "$machine" --image-family "$image" \
      --image-project ubuntu-os-accelerator-images --boot-disk-size 200GB \
      --boot-disk-type "$disk" --maintenance-policy TERMINATE --scopes cloud-platform \
      ${capacity[@]+"${capacity[@]}"} || return
  for number in "${missing[@]}"; do
    group create "$number" --size "$size" --template "$path/instanceTemplates/$template" \
      --default-action-on-vm-failure do-nothing ${slice[@]+"${slice[@]}"} || return
    : >"$FOLDER/made"
  done
}
every_slice() { seq 0 $((SLICES - 1)); }
drop() {
  local number code=0
  for number in $(if [[ $* ]]; then every_slice; else echo "${lost[@]}"; fi); do
    group delete "$number" --quiet || code=$?
  done
  return "$code"
}
deletes() { # the template and the policy cost nothing
  echo "gcloud compute instance-groups managed delete $(every_slice | sed "s/^/$TPU-/" | xargs)" \
    "--zone $ZONE"
}

# hosts: the names of all, slice by slice; missing, lost: numbers of slices.
hosts=() missing=() lost=()
look() {
  local number listed name status running gone
  hosts=() missing=() lost=() state=READY
  for number in $(every_slice); do
    if ! listed=$(group list-instances "$number" \
      --format='csv[no-heading](instance.basename(),instanceStatus)' 2>"$FOLDER/said"); then
      grep -qE "$ABSENT" "$FOLDER/said" || {
        failed
        return
      }
      missing+=("$number")
      continue
    fi
    there=yes running=0 gone=''
    while IFS=, read -r name status; do
      case $status in
        RUNNING) hosts+=("$name") running=$((running + 1)) ;;
        STOPP* | TERMINATED | SUSPEND*) gone=yes ;;
        ?*) state=$status ;;
      esac
    done <<<"$listed"
    [[ ! $gone ]] || lost+=("$number")
    ((running == size)) || [[ $state != READY ]] || state=PENDING
  done
  if ((${#lost[@]})); then # Spot VMs of a group only come back with a new group
    state=PREEMPTED
  elif ((${#missing[@]})); then
    state=none
    ((${#missing[@]} < SLICES)) || there=''
  fi
}

# on_host NUMBER CODE. libtpu finds the chips of a slice, and by these variables the other slices.
on_host() {
  local variables="NUMBER=$1;"
  ((SLICES == 1)) || variables+=" export MEGASCALE_COORDINATOR_ADDRESS=${hosts[0]}\
 MEGASCALE_NUM_SLICES=$SLICES MEGASCALE_SLICE_ID=$(($1 / size));"
  gcloud compute ssh "${hosts[$1]}" --zone "$ZONE" --command "$variables $2"
}
# The lowest exit code is that of the cause: others end with 3 or 75 because of it.
on_every_host() {
  local number processes=() code lowest=0
  for number in "${!hosts[@]}"; do
    heard "$number" on_host "$number" "$1" &
    processes+=($!)
  done
  last=$FOLDER/last.0
  for number in "${!processes[@]}"; do
    wait "${processes[number]}" && continue
    code=$?
    ((lowest && lowest <= code)) || lowest=$code last=$FOLDER/last.$number
  done
  return "$lowest"
}
first_host() { on_host 0 "$1"; }
copy() {
  local host processes=() code=0
  for host in "${hosts[@]}"; do
    gcloud compute scp "$1" "$host": --zone "$ZONE" &
    processes+=($!)
  done
  for host in "${processes[@]}"; do wait "$host" || code=$?; done
  return "$code"
}
join() {
  ((${#hosts[@]} == 1)) || echo " --coordinator_address ${hosts[0]}:8476" \
    "--num_processes ${#hosts[@]} --process_id \$NUMBER"
}

run_until_done join
