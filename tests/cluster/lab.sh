#!/usr/bin/env bash
# A login node h0 and hosts h1, h2, for .ci/cluster, which starts this as the first process of a PID and a mount
# namespace of its own. It makes, in this order:
#   root    a copy-on-write copy of / in memory: packages and files go there, never onto the machine
#   hosts   each with a name, network, processes, /tmp, /run and /dev/shm of its own; everything else they share, as a
#           cluster shares its file systems. 1 Gbit/s links where the kernel can slow them down
#   Slurm   slurmctld on h0, slurmd on h1 and h2, without a default MPI, as Debian ships it
#   Grid Engine   sge_qmaster on h0, sge_execd on h1 and h2, a queue of two slots each, a parallel environment mpi
# and runs tests/cluster/checks.py there. Status 77: something could not be had, and one line says what.
set -Eeuo pipefail
checkout=$1
hosts="h0 h1 h2"
packages="slurmctld slurmd slurm-client munge gridengine-master gridengine-exec gridengine-client openssh-server
    openssh-client libpmix-dev python3-venv"
cd "$checkout"
exec 3> /dev/null 4> build/cluster.log
case ${2:---all} in --all) exec 3> build/cluster.json ;; esac       # else it is not the whole of it

cannot() { echo "cluster: left out, $*"; exit 77; }
in_root() { chroot /mnt/copy "$@"; }
on() {          # on HOST COMMAND...: as root
    local host=$1
    shift
    nsenter --target "$(cat "/mnt/copy/lab/$host")" --net --uts --ipc --mount --pid --root --wd "$@"
}

make_root() {   # /mnt is in this mount namespace alone
    mount -t tmpfs -o size=6g tmpfs /mnt
    mkdir /mnt/changes /mnt/work /mnt/copy
    mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/changes,workdir=/mnt/work /mnt/copy
    for folder in proc sys dev; do mount --rbind /$folder /mnt/copy/$folder; done
    mkdir -p /mnt/copy/lab
    cp tests/cluster/*.sh tests/cluster/*.py /mnt/copy/lab/
}

install_packages() {
    printf '#!/bin/sh\nexit 101\n' > /mnt/copy/usr/sbin/policy-rc.d        # a package must not start its services
    chmod +x /mnt/copy/usr/sbin/policy-rc.d
    in_root timeout 60 apt-get update -q -o Acquire::Retries=1 >&4 2>&1 ||
        cannot "Debian's package server does not answer"
    in_root env DEBIAN_FRONTEND=noninteractive timeout 200 apt-get install -yq --no-install-recommends \
        -o Dpkg::Options::=--force-unsafe-io -o Acquire::Retries=1 $packages >&4 2>&1 ||
        cannot "apt-get could not install $packages (build/cluster.log)"
}

make_user() {   # with a key for ssh between the hosts, and the project as it lies here
    in_root useradd --create-home --password '*' --shell /bin/bash student
    in_root ssh-keygen -A >&4
    mkdir /mnt/copy/home/student/.ssh
    ssh=/home/student/.ssh
    in_root ssh-keygen -q -t ed25519 -N '' -f $ssh/id_ed25519
    cp /mnt/copy$ssh/id_ed25519.pub /mnt/copy$ssh/authorized_keys
    printf 'StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n' > /mnt/copy$ssh/config
    mkdir /mnt/copy/home/student/mpitp
    git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null |
        tar --create --files-from - | tar --extract --no-same-owner --directory /mnt/copy/home/student/mpitp
    in_root chown -R student: /home/student
}

make_host() {   # make_host NAME NUMBER; h0 carries the switch between all of them
    local name=$1 address=10.77.0.1$2
    unshare --net --uts --ipc --mount --pid --fork --kill-child --propagation private chroot /mnt/copy \
        /lab/host.sh "$name" >&4 2>&1 &
    local outer=$! inner=
    until inner=$(cat /proc/$outer/task/$outer/children 2>/dev/null) && [ -n "$inner" ]; do sleep 0.05; done
    echo $inner > "/mnt/copy/lab/$name"
    until [ -e "/mnt/copy/lab/$name.ready" ]; do
        kill -0 $outer 2>/dev/null || cannot "found no way to make host $name (build/cluster.log)"
        sleep 0.05
    done
    echo "$address $name" >> /mnt/copy/etc/hosts
    if [ "$name" = h0 ]; then
        on h0 ip link add eth0 type bridge
    else
        # from here, since h0 does not know the process numbers of other hosts
        nsenter --target "$(cat /mnt/copy/lab/h0)" --net ip link add "$name" type veth peer name eth0 netns $inner
        on h0 ip link set "$name" master eth0 up
        on h0 tc qdisc add dev "$name" root tbf rate 1gbit burst 128kb latency 20ms 2>&4 || true
        on "$name" tc qdisc add dev eth0 root tbf rate 1gbit burst 128kb latency 20ms 2>&4 || true
    fi
    on "$name" ip address add $address/24 dev eth0
    on "$name" ip link set eth0 up
}

start_sshd() { for host in $hosts; do on $host /usr/sbin/sshd -o PidFile=none -o UsePAM=no -o AcceptEnv='*'; done; }

start_slurm() {
    mkdir -p /mnt/copy/etc/slurm
    cp tests/cluster/slurm.conf /mnt/copy/etc/slurm/
    echo CgroupPlugin=cgroup/v1 > /mnt/copy/etc/slurm/cgroup.conf
    in_root install -d -o slurm /var/spool/slurm /var/log/slurm
    in_root chown munge /etc/munge/munge.key
    for host in $hosts; do
        on $host install -d -o munge /run/munge
        on $host setpriv --reuid munge --regid munge --clear-groups munged --log-file=/run/munge/log \
            --pid-file=/run/munge/pid --seed-file=/run/munge/seed
    done
    on h0 slurmctld -c
    for host in $hosts; do [ $host = h0 ] || on $host slurmd; done
    for _ in $(seq 300); do
        [ "$(on h0 sinfo -h -t idle -o %D)" != 2 ] || return 0
        sleep 0.1
    done
    cat /mnt/copy/var/log/slurm/* >&4
    cannot "found a Slurm whose nodes are not idle after 30 s (build/cluster.log)"
}

start_grid_engine() {
    export SGE_ROOT=/var/lib/gridengine         # where Debian's package has made a cell of its own
    cp tests/cluster/grid_engine_pe.conf /mnt/copy/lab/
    echo h0 > /mnt/copy$SGE_ROOT/default/common/act_qmaster
    on h0 setpriv --reuid sgeadmin --regid sgeadmin --clear-groups sge_qmaster
    for host in h0 h1 h2; do
        on h0 qconf -ah $host || true           # h0 is there already
        on h0 qconf -as $host
    done >&4 2>&1
    on h0 bash -ec 'qconf -Ap /lab/grid_engine_pe.conf
        printf "group_name @allhosts\nhostlist h1 h2\n" > /tmp/hosts
        qconf -Ahgrp /tmp/hosts
        qconf -sq | sed "s/^qname.*/qname main.q/; s/^hostlist.*/hostlist @allhosts/; s/^slots.*/slots 2/
            s/^pe_list.*/pe_list mpi/; s/^load_thresholds.*/load_thresholds NONE/; s,^shell .*,shell /bin/bash," > /tmp/queue
        qconf -Aq /tmp/queue
        qconf -ssconf | sed "s/^flush_\(.*\)_sec.*/flush_\1_sec 1/" > /tmp/scheduler      # else it looks every 15 s
        qconf -Msconf /tmp/scheduler' >&4 2>&1
    install -d /mnt/copy/var/spool/gridengine/execd
    in_root chown sgeadmin /var/spool/gridengine/execd
    for host in h1 h2; do on $host sge_execd >&4 2>&1; done
}

say() { echo "cluster: ${SECONDS} s, $*"; }

# A machine on which hosts or Slurm cannot be set up says nothing about this project.
trap 'cannot "found a step of the set-up that failed (build/cluster.log)"' ERR
make_root
if [ "${2:-}" = --hosts-only ]; then
    for host in $hosts; do make_host $host ${host#h}; done
    trap - ERR
    say "hosts are up"
    wait -n                     # for ever, but for a host that ends
    exit 1
fi
say "packages"
install_packages
make_user
say "hosts, Slurm and Grid Engine"
for host in $hosts; do make_host $host ${host#h}; done
start_sshd
start_slurm
start_grid_engine
trap - ERR
say "checks"
chroot /mnt/copy /usr/bin/python3 /lab/checks.py "${@:2}" >&3
