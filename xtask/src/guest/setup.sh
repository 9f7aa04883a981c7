#!/bin/sh
# Inside the guest, with the host's programs or its own: makes a machine that has everything a test may ask for, then runs the agent.
# What an old kernel lacks fails here without a word, and is named by the test that misses it.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
exec 2>/dev/console

mkdir -p /dev/shm /dev/pts /run /tmp /lib/modules /root
# What an installation makes, where packages were only unpacked.
for file in passwd group; do
    [ -e /etc/$file ] || cp /usr/share/base-passwd/$file.master /etc/$file
done
[ -e /usr/bin/cc ] || ln -s gcc /usr/bin/cc
# MPI wants a name of the machine.
echo guest >/proc/sys/kernel/hostname
mount -t tmpfs tmpfs /dev/shm
mount -t devpts -o ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t tracefs tracefs /sys/kernel/tracing
mount --bind "$MODULES" /lib/modules
grep -qw vmx /proc/cpuinfo && kvm=kvm-intel || kvm=kvm-amd
for module in virtio_blk ext4 $kvm rdma_rxe ib_uverbs rdma_ucm dummy vfio_iommu_type1 vfio-pci; do
    modprobe -q "$module"
done
# The emulator's teaching device, for a test to drive through VFIO.
echo 1234 11e8 >/sys/bus/pci/drivers/vfio-pci/new_id

# A virtual machine that stays. The first one and the last one patch the scheduler's code (a static key), and with two threads
# the emulator can run into the breakpoint that the kernel puts there meanwhile, and has already taken out.
python3 -c 'import fcntl, signal
kvm = open("/dev/kvm")
machine = fcntl.ioctl(kvm, 0xAE01, 0)
signal.pause()' &
# The same for the tracepoint: beside two listeners that stay, one more or less changes no code.
for trace in /sys/kernel/tracing /sys/kernel/tracing/instances/still; do
    mkdir -p $trace
    echo 0 >$trace/tracing_on
    echo 1 >$trace/events/kvm/kvm_unmap_hva_range/enable
done

# A disk for scratch files (what is in memory cannot be written back), and swap space.
mount -t ext4 /dev/vda /tmp && chmod 1777 /tmp
swapon /dev/vdb

# What hosts seldom have: merging of equal pages, eager huge pages, memory that follows its user from node to node, cgroups.
mount -t cgroup2 cgroup2 /sys/fs/cgroup && echo +memory >/sys/fs/cgroup/cgroup.subtree_control
# The older freezer, too: nothing else stops what it holds.
mkdir -p /run/freezer && mount -t cgroup -o freezer cgroup /run/freezer
echo 20 >/sys/kernel/mm/ksm/sleep_millisecs
echo 1000 >/sys/kernel/mm/ksm/pages_to_scan
echo 1 >/sys/kernel/mm/ksm/run
echo always >/sys/kernel/mm/transparent_hugepage/enabled
echo 50 >/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs
# It takes whole regions only: one that is to be collapsed by a call has a hole, to be left alone until then.
echo 0 >/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none
echo 1 >/proc/sys/kernel/numa_balancing
# They are nice to others, and here two processors are kept busy by tests that wait for them.
renice -n -15 -p $(pgrep -x 'ksmd|khugepaged') >/dev/null
echo 1 >/proc/sys/vm/unprivileged_userfaultfd

# A network card that does RDMA in software.
ip link set lo up
ip link add dummy0 type dummy && ip address add 192.0.2.1/24 dev dummy0 && ip link set dummy0 up
rdma link add rxe0 type rxe netdev dummy0

if [ -n "$SHELL_WANTED" ]; then
    stty -F "/dev/$LINE" sane
    cd "$WORKSPACE" && setsid -c /bin/bash -i <>"/dev/$LINE" >&0 2>&0
else
    stty -F "/dev/$LINE" raw -echo
    "$AGENT" guest-agent "$RUN" <>"/dev/$LINE" >&0
fi
busybox poweroff -f
