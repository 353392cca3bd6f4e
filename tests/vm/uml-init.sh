#!/bin/bash
# Process 1 of the image on the user-mode kernel: no systemd; commands come and go as files in a directory of the host.
#   N.sh -> run with bash; N.out <- its output; N.rc <- its exit code; halt -> power off
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm /job
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=0755,size=128m tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -o remount,rw /
hostname mooring-vm
ip link set lo up
modprobe -a fuse overlay
job=$(sed -n 's/.*mooring\.job=\([^ ]*\).*/\1/p' /proc/cmdline)
mount -t hostfs -o "$job" none /job
touch /job/up
while [ ! -e /job/halt ]; do
    for script in /job/*.sh; do
        [ -e "$script" ] || continue
        name=${script%.sh}
        mv "$script" "$name.running"
        (
            setsid bash "$name.running" >"$name.out" 2>&1 </dev/null
            echo $? >"$name.rc.part"
            mv "$name.rc.part" "$name.rc"
        ) &
    done
    sleep 0.1
done
sync
mount -o remount,ro / 2>/dev/null
echo o >/proc/sysrq-trigger
sleep 60
