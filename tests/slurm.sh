#!/bin/bash
# A Slurm of its own on this machine, all of it below DIR:
#   slurm.sh start DIR NODES SLOTS PORT     then: export SLURM_CONF=DIR/slurm.conf
#   slurm.sh ctld DIR                       starts the controller (again)
#   slurm.sh stop DIR                       leaves nothing
# NODES daemons with SLOTS processors each, nPORT-1, nPORT-2, ... (names of their own, for their
# cgroups are called so); the controller listens on PORT, node i on PORT + i.
set -eu
what=$1 dir=$2
export SLURM_CONF=$dir/slurm.conf

daemon() { # NAME COMMAND...: in the background, with a file that names its pid
    local name=$1
    shift
    setsid "$@" </dev/null >"$dir/log.$name" 2>&1 &
    echo $! >"$dir/pid.$name"
}

start() {
    local nodes=$1 slots=$2 port=$3 host node
    host=$(hostname -s)
    mkdir -p "$dir/state"
    touch "$dir/plugstack.conf"
    printf 'CgroupPlugin=%s\nCgroupAutomount=no\n' \
        "$([ -e /sys/fs/cgroup/cgroup.controllers ] && echo cgroup/v2 || echo cgroup/v1)" \
        >"$dir/cgroup.conf"
    cat >"$dir/slurm.conf" <<END
ClusterName=c$port
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.sock
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/own.slurmctld
SlurmdPidFile=$dir/own.%n
PlugStackConfig=$dir/plugstack.conf
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=0
KillWait=30
MinJobAge=5
SlurmctldTimeout=30
SlurmdTimeout=120
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
END
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    daemon munged munged -F --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" \
        --pid-file="$dir/own.munged" --log-file="$dir/log.munge" --seed-file="$dir/munge.seed"
    for _ in $(seq 200); do [ -S "$dir/munge.sock" ] && break || sleep 0.05; done
    for node in $(seq "$nodes"); do
        echo "NodeName=n$port-$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node))" \
            "CPUs=$slots RealMemory=1000 State=UNKNOWN" >>"$dir/slurm.conf"
    done
    ctld
    for node in $(seq "$nodes"); do
        mkdir -p "$dir/spool.n$port-$node"
        daemon "n$port-$node" slurmd -D -N "n$port-$node"
    done
    for _ in $(seq 300); do
        [ "$(sinfo -h -N -o %t 2>/dev/null | grep -c idle)" = "$nodes" ] && return || sleep 0.1
    done
    tail -n 5 "$dir"/log.* >&2
    return 1
}

ctld() {
    daemon slurmctld slurmctld -D -i
}

stop() {
    local pids=() pid file
    scancel -Q -s KILL -u "$(id -un)" 2>/dev/null || true
    for _ in $(seq 50); do
        [ -n "$(squeue -h -o %i 2>/dev/null)" ] && sleep 0.1 || break
    done
    for file in "$dir"/pid.n* "$dir"/pid.slurmctld "$dir"/pid.munged; do
        pid=$(cat "$file" 2>/dev/null) && kill "$pid" 2>/dev/null && pids+=("$pid")
    done
    for pid in ${pids[@]+"${pids[@]}"}; do
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null && sleep 0.05 || break; done
        kill -s KILL "$pid" 2>/dev/null || true
    done
    for file in "$dir"/pid.n*; do
        for group in /sys/fs/cgroup/*/"slurm_${file##*/pid.}"; do
            for _ in $(seq 50); do # what is still in it belongs to a step, and is ended
                [ -d "$group" ] || break
                find "$group" -name cgroup.procs -exec cat {} + | xargs -r kill -s KILL 2>/dev/null ||
                    true
                find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null || sleep 0.1
            done
        done
    done
    rm -rf "$dir"
}

shift 2
"$what" "$@"
