#!/usr/bin/env bash
# Train an experiment of configs/ with torchrun, on this node or as one of several.
#
#   launch/train.sh [--dry-run] [--point N] EXPERIMENT [flags of Megatron and ours]
#   launch/train.sh --commands FILE
#
#   --point N          of the experiment's sweep
#   --dry-run          print the command of every node and start nothing
#   --commands FILE    run this node's command of those that a dry run has printed
#   --print-run-dir    print the run's folder and start nothing
#
# Flags after EXPERIMENT replace the experiment's own. Read from the environment, first what is asked
# for by name, then Slurm's:
#
#   NNODES, NODE_RANK           1 and 0; SLURM_NNODES, SLURM_NODEID
#   MASTER_ADDR, MASTER_PORT    node 0 as the others reach it, and a free port there; the first of
#                               SLURM_JOB_NODELIST, and 29500
#   NPROC_PER_NODE              ranks on each node; SLURM_GPUS_ON_NODE, or as many as nvidia-smi lists
#   RUNS                        runs: the folder of all runs
#   RUN_DIR                     RUNS/EXPERIMENT: checkpoints, records, logs; a run in there goes on
#   LOG_DIR                     where each rank's output goes as well, if set
#   LEAVE_FILE                  when this file appears, it is as if SIGUSR1 had come
#   SCRIPT                      a training script of your own, such as Megatron-LM's pretrain_gpt.py
#   PYTHON                      the checkout's .venv, or python3
#   and the variables of env.sh
#
# SIGUSR1 to this script lets Megatron save a checkpoint and end with exit code 0.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    printf 'launch/train.sh: error: %s\n' "$*" >&2
    exit 2
}

# whole NAME VALUE LOWEST: fail unless VALUE is a whole number from LOWEST on.
whole() {
    if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
        fail "$1=$2 must be a whole number from $3 on"
    fi
}

# read_options OPTIONS: sets `mode`, `point` and `commands`, and `rest` to what follows them.
read_options() {
    mode=run point=() commands=''
    while [[ ${1-} == --* ]]; do
        case $1 in
            --dry-run | --print-run-dir) mode=${1#--} ;;
            --point)
                whole --point "${2-}" 0
                point=(--point "$2")
                shift
                ;;
            --commands)
                commands=${2-}
                [[ -r $commands ]] || fail "--commands $commands: no such file; it is what a dry run prints"
                shift
                ;;
            *) fail "unknown option $1; flags of Megatron come after the experiment" ;;
        esac
        shift
    done
    rest=("$@")
}

# find_nodes: sets `nnodes` and `node_rank`.
find_nodes() {
    nnodes=${NNODES:-${SLURM_NNODES:-1}}
    node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
    whole NNODES "$nnodes" 1
    whole NODE_RANK "$node_rank" 0
    ((node_rank < nnodes)) || fail "NODE_RANK=$node_rank must be below NNODES=$nnodes"
}

# find_run_dir EXPERIMENT: sets `run_dir`.
find_run_dir() {
    if [[ -n ${RUN_DIR:-} ]]; then
        ((${#point[@]} == 0)) || fail "RUN_DIR=$RUN_DIR would be that of every point; set RUNS, the folder above"
        run_dir=$RUN_DIR
    else
        run_dir=$("${render[@]}" --name "$1") || exit 2
        run_dir=${RUNS:-runs}/$run_dir
    fi
}

# find_rendezvous: sets `nodes`, their names where Slurm tells them, `master_addr`, `master_port`, `nproc`.
find_rendezvous() {
    nodes=()
    if [[ -n ${SLURM_JOB_NODELIST:-} ]] && type -P scontrol >/dev/null; then
        mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    fi
    master_addr=${MASTER_ADDR:-${nodes[0]:-}}
    if [[ -z $master_addr ]]; then
        ((nnodes == 1)) || fail "NNODES=$nnodes needs MASTER_ADDR, the name of node 0 as the others reach it"
        master_addr=127.0.0.1
    fi
    master_port=${MASTER_PORT:-29500}
    whole MASTER_PORT "$master_port" 1

    nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    if [[ -z $nproc ]]; then
        nproc=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
        ((nproc)) || fail 'nvidia-smi lists no GPU here; set NPROC_PER_NODE to the number of ranks on a node'
    fi
    whole NPROC_PER_NODE "$nproc" 1
}

# find_training EXPERIMENT FLAGS: sets `training`, the script with all flags.
find_training() {
    local experiment=$1 run leave flags
    shift
    run=(
        --save "$run_dir/checkpoints"
        --load "$run_dir/checkpoints" # empty at first: Megatron then starts anew
        --spectral-run-dir "$run_dir"
    )
    leave=(
        --exit-signal-handler # a checkpoint, then the end
        --exit-signal SIGUSR1 # SIGTERM is the launcher's own: it gives ranks 30 seconds
    )
    mapfile -d '' -t flags < <("${render[@]}" --null "$experiment" "${run[@]}" "${leave[@]}" "$@")
    wait $! || exit 2
    training=(-m sso_megatron.pretrain_gpt)
    if [[ -n ${SCRIPT:-} ]]; then training=(-m sso_megatron.run "$SCRIPT"); fi
    training+=("${flags[@]}")
}

# compose RANK: sets `command` to that of a node.
compose() {
    local torchrun=(
        --nnodes "$nnodes"
        --node-rank "$1"
        --nproc-per-node "$nproc"
        --master-addr "$master_addr"
        --master-port "$master_port"
    )
    if [[ -n ${LOG_DIR:-} ]]; then
        torchrun+=(--log-dir "$LOG_DIR/ranks-of-node-$1" --tee 3)
    fi
    command=(
        env "${environment[@]}"
        "$python" -m torch.distributed.run "${torchrun[@]}" "${training[@]}"
    )
}

# print_commands: of every node a line, below one that says which.
print_commands() {
    for ((rank = 0; rank < nnodes; rank++)); do
        compose "$rank"
        printf '# node %d of %d%s\n' "$rank" "$nnodes" "${nodes[rank]:+, ${nodes[rank]}}"
        printf '%q ' "${command[@]}"
        printf '\n'
    done
}

# read_command: sets `command` to that of this node.
read_command() {
    local lines
    mapfile -t lines <"$commands"
    [[ ${lines[2 * node_rank]-} == "# node $node_rank of $nnodes"@(|, *) ]] ||
        fail "$commands has no command for node $node_rank of $nnodes; write it by a dry run for as many nodes"
    eval "command=(${lines[2 * node_rank + 1]})" # quoted by print_commands
}

# run_command: this node's; passes on signals.
run_command() {
    local agent pause leaving=0
    type -P pkill >/dev/null || fail 'pkill is missing; install procps'
    # torchrun would end at SIGUSR1, so it ignores it, and its ranks do until Megatron listens.
    (trap '' USR1 && exec "${command[@]}") &
    agent=$!
    trap 'leaving=1' USR1
    trap 'kill -TERM "$agent" || true' TERM INT HUP
    while kill -0 "$agent" 2>/dev/null; do
        if [[ -n ${LEAVE_FILE:-} && -e $LEAVE_FILE ]]; then leaving=1; fi
        if ((leaving)); then pkill -USR1 -P "$agent" || true; fi # again and again, until Megatron listens
        sleep 5 &
        pause=$!
        wait -n "$agent" "$pause" || true # a signal interrupts it
        kill "$pause" 2>/dev/null || true
    done
    wait "$agent"
}

read_options "$@"
find_nodes
if [[ -n $commands ]]; then
    read_command
    run_command
    exit
fi
((${#rest[@]})) || fail 'name an experiment; sso-megatron render --list shows them'
python=${PYTHON:-$here/../.venv/bin/python}
if [[ -z ${PYTHON:-} && ! -x $python ]]; then python=python3; fi
render=("$python" -m sso_megatron.cli.main render "${point[@]}")
find_run_dir "${rest[0]}"
if [[ $mode == print-run-dir ]]; then
    printf '%s\n' "$run_dir"
    exit
fi
# shellcheck source=launch/env.sh
source "$here/env.sh"
find_rendezvous
find_training "${rest[@]}"
if [[ $mode == dry-run ]]; then
    print_commands
    exit
fi
mkdir -p "$run_dir"
compose "$node_rank"
run_command
