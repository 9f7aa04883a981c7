//! x86-64: the machine has the host's root folder.

use super::super::kernel::Series;
use super::super::machine::Accelerator;
use super::Arch;

pub(super) const ARCH: Arch = Arch {
    name: "x86_64",
    debian: "amd64",
    triple: "x86_64-unknown-linux-gnu",
    emulator: "qemu-system-x86_64",
    series: &[
        Series::debian("5.10", "bullseye", "userfaultfd bpf iouring"),
        Series::debian("6.1", "bookworm", "userfaultfd"),
        Series::debian("6.12", "trixie", ""),
        Series::debian("6.18", "trixie-backports", ""),
        Series::debian("newest", "trixie-backports", ""),
    ],
    default: "6.12",
    standard: &[
        // The broker's tests load BPF programs in several processes, and the emulated kernel takes
        // long to verify these programs. So only the unit tests of the broker run, and only for the
        // table.
        (
            "kernel source",
            "test -p mmu-source --lib --test it -- kernel --skip broker",
        ),
        (
            "kernel cache",
            "test -p regcache --features vfio --test it -- kernel uring",
        ),
        ("VFIO", "test -p regcache --features vfio --test vfio"),
        (
            "coverage",
            "test -p mmun --test it -- coverage::the_kernel_misses_nothing",
        ),
        // The test of two processes runs two examples.
        ("RDMA", "build -p regcache-rdma --features verbs --examples"),
        ("RDMA", "test -p regcache-rdma --features verbs --test it"),
        (
            "RDMA",
            "run -p regcache-rdma --features verbs --example rdma_read",
        ),
        ("stress kernel", "run -p stress -- kernel --seconds 5"),
        (
            "trace",
            "test -p mmu-source --test it -- again:: calls:: death::",
        ),
    ],
    more: &[
        ("broker", "test -p mmu-source --lib broker"),
        (
            "process",
            "test -p mmu-source --test it -- --skip kernel --skip broker",
        ),
    ],
    needed: &[
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("python3", "python3"),
        ("rdma", "iproute2"),
        // The build and run-time dependencies of `regcache-rdma`'s tests.
        ("cmake", "cmake"),
        ("/usr/lib/llvm-*/lib/libclang.so", "libclang-dev"),
        ("/etc/libibverbs.d/rxe.driver", "ibverbs-providers"),
    ],
    board: |accelerator| {
        // An IOMMU that guards interrupts needs the interrupt controller in the emulator, even if
        // KVM runs the rest of the machine.
        let processor = match accelerator {
            Accelerator::Kvm => ["-accel", "kvm,kernel-irqchip=split", "-cpu", "host"],
            Accelerator::Emulation => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        };
        ["-M", "q35"]
            .into_iter()
            .chain(processor)
            // Adds an IOMMU and a device that copies memory, for the tests of VFIO.
            .chain(["-device", "intel-iommu", "-device", "edu"])
            .map(str::to_owned)
            .collect()
    },
    // While the kernel boots, it tests the timer's interrupt against a clock that keeps running
    // when the host is busy. Without `no_timer_check`, on a busy host the kernel sees no interrupt
    // in time, and hangs.
    parameters: "console=ttyS0 no_timer_check intel_iommu=on",
    line: (&["-serial", "chardev:line"], "ttyS1"),
    foreign: None,
};
