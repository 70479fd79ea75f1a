#!/usr/bin/env bash
# The first process of a host, in namespaces of its own: what is private to a host is made here. See lab.sh.
set -euo pipefail
hostname "$1"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
for folder in tmp run dev/shm; do
    mount -t tmpfs tmpfs /$folder
    chmod 1777 /$folder
done
mount -t tmpfs tmpfs /sys/fs/cgroup        # slurmd starts only where something is mounted there
mkdir -p /run/sshd
chmod 755 /run /run/sshd
ip link set lo up
touch "/lab/$1.ready"
while :; do sleep 1000 & wait; done       # a shell that waits also buries the processes whose parents died
