#!/bin/sh
# Runs inside the guest, with the host's programs or the guest's own. Sets up everything that a test
# can require, then runs the agent. If an old kernel lacks a feature, the command here fails and the
# script continues. The test that needs the feature reports the lack.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
exec 2>/dev/console

mkdir -p /dev/shm /dev/pts /run /tmp /lib/modules /root
# Make the files that an installation makes, because the packages were only unpacked.
for file in passwd group; do
    [ -e /etc/$file ] || cp /usr/share/base-passwd/$file.master /etc/$file
done
[ -e /usr/bin/cc ] || ln -s gcc /usr/bin/cc
[ -e /etc/ld.so.cache ] || ldconfig
# The names that a system makes at its start.
[ -e /dev/stdin ] || ln -s /proc/self/fd/0 /dev/stdin
[ -e /dev/stdout ] || ln -s /proc/self/fd/1 /dev/stdout
[ -e /dev/stderr ] || ln -s /proc/self/fd/2 /dev/stderr
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
# MPI needs a host name, and libfabric its address.
echo guest >/proc/sys/kernel/hostname
echo '192.0.2.1 guest' >>/etc/hosts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts -o ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t tracefs tracefs /sys/kernel/tracing
mount --bind "$MODULES" /lib/modules
grep -qw vmx /proc/cpuinfo && kvm=kvm-intel || kvm=kvm-amd
for module in virtio_blk ext4 $kvm rdma_rxe ib_uverbs rdma_ucm dummy vfio_iommu_type1 vfio-pci; do
    modprobe -q "$module"
done
# Bind the emulator's teaching device to VFIO, so that a test can drive it.
echo 1234 11e8 >/sys/bus/pci/drivers/vfio-pci/new_id

# Keep a virtual machine open. When the first one opens and when the last one closes, the kernel
# patches the scheduler's code (a static key). With two threads the emulator can execute the
# breakpoint that the kernel uses for patching, after the kernel has removed it.
python3 -c 'import fcntl, signal
kvm = open("/dev/kvm")
machine = fcntl.ioctl(kvm, 0xAE01, 0)
signal.pause()' &
# The same holds for the tracepoint: while two listeners stay attached, a further one patches no
# code.
for trace in /sys/kernel/tracing /sys/kernel/tracing/instances/still; do
    mkdir -p $trace
    echo 0 >$trace/tracing_on
    echo 1 >$trace/events/kvm/kvm_unmap_hva_range/enable
done

# A disk for scratch files, because a file system in memory has no writeback; and swap space.
mount -t ext4 /dev/vda /tmp && chmod 1777 /tmp
mkswap /dev/vdb >/dev/null && swapon /dev/vdb

# Features that are rarely enabled on hosts: merging of equal pages, eager huge pages, NUMA
# balancing, cgroups.
mount -t cgroup2 cgroup2 /sys/fs/cgroup && echo +memory >/sys/fs/cgroup/cgroup.subtree_control
# The cgroup v1 freezer as well, because it holds processes so that not even ptrace can stop them.
mkdir -p /run/freezer && mount -t cgroup -o freezer cgroup /run/freezer
echo 20 >/sys/kernel/mm/ksm/sleep_millisecs
echo 1000 >/sys/kernel/mm/ksm/pages_to_scan
echo 1 >/sys/kernel/mm/ksm/run
echo always >/sys/kernel/mm/transparent_hugepage/enabled
echo 50 >/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs
# After it found no free huge page, khugepaged sleeps for a minute, which is longer than a test waits.
echo 100 >/sys/kernel/mm/transparent_hugepage/khugepaged/alloc_sleep_millisecs
# Let khugepaged collapse only regions without a hole. A region that a test will collapse with
# madvise() has a hole until then, so khugepaged leaves it alone.
echo 0 >/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none
echo 1 >/proc/sys/kernel/numa_balancing
# ksmd and khugepaged have a low priority. Raise it, because tests wait for them and keep both
# processors busy.
renice -n -15 -p $(pgrep -x 'ksmd|khugepaged') >/dev/null
echo 1 >/proc/sys/vm/unprivileged_userfaultfd

# A network card that does RDMA in software. The module `dummy` may have made a card `dummy0` when it
# was loaded: systemd turns that off where it is installed.
ip link set lo up
ip link add card0 type dummy && ip address add 192.0.2.1/24 dev card0 && ip link set card0 up
rdma link add rxe0 type rxe netdev card0

if [ -n "$SHELL_WANTED" ]; then
    stty -F "/dev/$LINE" sane
    cd "$WORKSPACE" && setsid -c /bin/bash -i <>"/dev/$LINE" >&0 2>&0
else
    stty -F "/dev/$LINE" raw -echo
    "$AGENT" guest-agent "$RUN" <>"/dev/$LINE" >&0
fi
busybox poweroff -f
