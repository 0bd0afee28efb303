# shellcheck shell=bash disable=SC2154  # what a template sets
# What the templates beside it share: `launch ARGUMENTS` runs train.sh ARGUMENTS, each node its command.
#
# A template sets
#   container        srun's options for a container; an empty array without one
#   max_fruitless    starts in a row without a new checkpoint after which the job is not queued again; 0: it
#                    is never queued again
#
# SIGUSR1 to the batch shell is the warning that the time limit is near: ranks save and end.
#
# In the run's folder, logs/JOB-START holds commands.txt, which is what the nodes run, node-N.log with what
# its ranks printed, and each rank's own output in ranks-of-node-N; requeues.log has a line for each start
# after which the job was queued again.

# say TEXT: into the job's log, with the time.
say() {
    printf '%(%F %T)T %s\n' -1 "$*"
}

# last_checkpoint: the iteration that a start goes on from.
last_checkpoint() {
    cat "$run_dir/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}

# free_port: below those that the system hands out by itself; jobs that share a node begin at different ones.
free_port() {
    local port=$((20000 + SLURM_JOB_ID % 10000))
    while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

launch() {
    compose_srun
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        show_without_slurm "$@"
        return
    fi
    unset NODE_RANK # one that came along from where the job was submitted would be that of all nodes
    export NNODES=$SLURM_JOB_NUM_NODES
    # The batch shell runs on node 0; a container may know neither scontrol nor this name.
    export MASTER_ADDR=${MASTER_ADDR:-$(hostname)}
    export MASTER_PORT=${MASTER_PORT:-$(free_port)}
    run_dir=$("${once[@]}" launch/train.sh --print-run-dir "$@")
    export LOG_DIR=$run_dir/logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    export LEAVE_FILE=$LOG_DIR/leave
    mkdir -p "$LOG_DIR"
    checkpoint=$(last_checkpoint)
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST goes on from iteration $checkpoint; logs in $LOG_DIR"
    "${once[@]}" launch/train.sh --dry-run "$@" >"$LOG_DIR/commands.txt" # a wrong flag ends the job here

    run_step
    say "$reason"
    if [[ $reason == finished ]]; then return; fi
    if ((step_status)); then show_failure; fi
    queue_again
}

# compose_srun: the arrays `everywhere`, for all nodes, and `once`, for a command that looks around.
compose_srun() {
    everywhere=(
        srun
        --ntasks-per-node=1
        --cpu-bind=none      # the node's cores for all its ranks and their data workers
        --kill-on-bad-exit=1 # ranks of other nodes would wait for those that are gone
        "${container[@]}"
    )
    once=()
    if ((${#container[@]})); then once=(srun --nodes=1 --ntasks=1 "${container[@]}"); fi
}

# show_without_slurm ARGUMENTS: what a job would run, for as many nodes as the template asks for.
show_without_slurm() {
    if [[ " $* " != *' --dry-run '* ]]; then
        echo "$0: error: not in a job; submit it with sbatch, or see its commands: bash $0 --dry-run ..." >&2
        exit 2
    fi
    export NNODES=${NNODES:-$(sed -n 's/^#SBATCH --nodes=\([0-9]*\).*/\1/p' "$0")}
    export MASTER_ADDR=${MASTER_ADDR:-FIRST_NODE}
    printf '# all nodes, from the batch shell; COMMANDS is what follows\n'
    printf '%q ' "${everywhere[@]}" launch/train.sh --commands COMMANDS
    printf '\n'
    exec launch/train.sh "$@"
}

# run_step: train; sets `step_status` and `reason`, which is `finished` or why it ended early.
run_step() {
    local step pause warned=0 deadline=
    "${everywhere[@]}" --output="$LOG_DIR/node-%n.log" launch/train.sh --commands "$LOG_DIR/commands.txt" &
    step=$!
    trap 'warned=1' USR1
    while kill -0 "$step" 2>/dev/null; do
        if ((warned)); then
            if [[ -z $deadline ]]; then
                say 'the time limit is near: ranks save a checkpoint and end'
                # Not a signal to the step: Slurm may send it to helpers of the ranks, too, and end them.
                touch "$LEAVE_FILE"
                deadline=$(($(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s) - 30))
            fi
            if (($(date +%s) >= deadline)); then
                reason='the time limit is near, and ranks have not ended' step_status=0
                return
            fi
        fi
        sleep 10 &
        pause=$!
        wait -n "$step" "$pause" || true # SIGUSR1 interrupts it
        kill "$pause" 2>/dev/null || true
    done
    step_status=0
    wait "$step" || step_status=$?
    if ((warned)); then
        reason='the time limit is near'
    elif ((step_status)); then
        reason="failed: srun ended with exit code $step_status"
    else
        reason=finished
    fi
}

# show_failure: what torchrun and this package say of what failed first, or else how the logs end.
show_failure() {
    local found
    found=$(grep -hE -A 7 'Root Cause|sso_megatron: error:' "$LOG_DIR"/node-*.log | head -n 24) || true
    say "about it in $LOG_DIR:"
    echo "${found:-$(tail -q -n 2 "$LOG_DIR"/node-*.log | head -n 24)}"
}

# rank_failed_with CODE: whether a rank has ended with it, and none before.
rank_failed_with() {
    grep -hA 7 'Root Cause' "$LOG_DIR"/node-*.log | grep -m 1 'exitcode' | grep -q " $1 (pid"
}

# queue_again: unless that would be no use, or is not wanted.
queue_again() {
    local now fruitless=0 log=$run_dir/requeues.log
    now=$(last_checkpoint)
    if ((max_fruitless == 0)); then exit "$step_status"; fi
    if rank_failed_with 2; then
        say 'that needs mending: not queued again'
        exit "$step_status"
    fi
    if rank_failed_with 3; then
        say 'stopped by --spectral-health: not queued again'
        exit "$step_status"
    fi
    touch "$log"
    if ((now == checkpoint)); then
        fruitless=$((1 + $(grep -c " job $SLURM_JOB_ID .* at iteration $now\$" "$log" || true)))
    fi
    if ((fruitless >= max_fruitless)); then
        say "no checkpoint after iteration $now in $fruitless starts: not queued again"
        exit $((step_status ? step_status : 1))
    fi
    say "queued again, to go on from iteration $now"
    say "job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0}: $reason, at iteration $now" >>"$log"
    scontrol requeue "$SLURM_JOB_ID"
}
