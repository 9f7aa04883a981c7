//! aarch64 on a host that is x86-64: tools and root folder are unpacked from Debian's packages.
//!
//! The emulation orders memory accesses as the x86-64 host does. So it tests code and system calls,
//! but not weak memory ordering, which the models test.

use super::super::kernel::Series;
use super::super::packages::Distribution;
use super::{Arch, Foreign};

/// The capabilities that the machine lacks. A browser and systemd are left out, because they would
/// double the size of the root folder. Debian 13 has newer versions of the two libraries. Its
/// `librdmacm` finds no address for libfabric (`rdma_getaddrinfo`: EAGAIN).
macro_rules! lacks {
    ($more:literal) => {
        concat!(
            "i386calls program(\"chromium\") program(\"systemd-analyze\") \
             program(\"systemd-socket-activate\") library(\"libopen-pal.so.40\") \
             library(\"libmimalloc.so.2.0\") provider(\"verbs;ofi_rxm\")",
            $more
        )
    };
}
const LACKS: &str = lacks!("");

pub(super) const ARCH: Arch = Arch {
    name: "aarch64",
    debian: "arm64",
    triple: "aarch64-unknown-linux-gnu",
    emulator: "qemu-system-aarch64",
    series: &[
        Series::debian("5.10", "bullseye", lacks!(" userfaultfd bpf iouring")),
        Series::debian("6.1", "bookworm", lacks!(" userfaultfd")),
        Series::debian("6.12", "trixie", LACKS),
        Series {
            flavour: "-16k",
            ..Series::debian("6.12-16k", "trixie", LACKS)
        },
        // Debian builds no kernel with pages of 64 KiB.
        Series {
            distribution: Distribution::Ubuntu,
            flavour: "-generic-64k",
            megabytes: 8192,
            ..Series::debian("7.0-64k", "resolute", LACKS)
        },
        Series::debian("newest", "trixie-backports", LACKS),
        Series {
            flavour: "-16k",
            ..Series::debian("newest-16k", "trixie-backports", LACKS)
        },
    ],
    default: "6.12",
    standard: &[
        ("core", "test -p srcu -p mmu-notifier --test it"),
        // Builds the library that the tests preload, because the machine has no Cargo.
        ("hook", "build -p mmu-source --example preload"),
        ("hook", "build -p mmu-source --example preload --release"),
        ("hook", "test -p mmu-source --test hook"),
        (
            "kernel source",
            "test -p mmu-source --lib --test it -- kernel --skip broker",
        ),
        ("kernel cache", "test -p regcache --test it"),
        ("VFIO", "test -p regcache --features vfio --test vfio"),
        (
            "coverage",
            "test -p mmun --test it -- coverage::the_kernel_misses_nothing",
        ),
        ("RDMA", "build -p regcache-rdma --features verbs --examples"),
        ("RDMA", "test -p regcache-rdma --features verbs --test it"),
        (
            "RDMA",
            "run -p regcache-rdma --features verbs --example rdma_read",
        ),
        ("stress kernel", "run -p stress -- kernel --seconds 5"),
        (
            "trace",
            "test -p mmu-source --test it -- again:: calls:: death:: life:: attach:: stop::",
        ),
    ],
    more: &[
        ("broker", "test -p mmu-source --lib --test it -- broker"),
        (
            "process",
            "test -p mmu-source --test it -- --skip kernel --skip broker",
        ),
        ("stress", "run -p stress -- srcu --seconds 60"),
        ("stress", "run -p stress -- mmu --seconds 60"),
        (
            "stress",
            "run -p stress -- regcache --seconds 60 --source hook",
        ),
        (
            "stress",
            "run -p stress -- regcache --seconds 60 --source kernel",
        ),
    ],
    needed: &[
        ("qemu-system-aarch64", "qemu-system-arm"),
        ("unshare", "util-linux"),
        ("chroot", "coreutils"),
    ],
    board: |_| {
        // The guest's kernel starts at EL2, so that the guest has KVM. The tests of VFIO use the
        // IOMMU and the device, which copies memory.
        let board = [
            "-M",
            "virt,virtualization=on,gic-version=3,iommu=smmuv3",
            "-accel",
            "tcg,thread=multi",
        ];
        board
            .into_iter()
            .chain(["-cpu", "max,pauth-impdef=on", "-device", "edu"])
            .map(str::to_owned)
            .collect()
    },
    parameters: "console=ttyAMA0",
    line: (
        &[
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtconsole,chardev=line",
        ],
        "hvc0",
    ),
    foreign: Some(&Foreign {
        tools: &[
            "rustc",
            "cargo",
            "libstd-rust-dev",
            "libstd-rust-dev:arm64",
            "gcc",
            "g++",
            "libc6-dev",
            "gcc-aarch64-linux-gnu",
            "g++-aarch64-linux-gnu",
            "libc6-dev-arm64-cross",
            "pkgconf-bin",
            // For the build of `regcache-rdma`.
            "cmake",
            "make",
            "libclang-dev",
            "dash",
            "sed",
            "coreutils",
        ],
        root: &[
            "busybox-static",
            "dash",
            "bash",
            "coreutils",
            "util-linux",
            "mount",
            "kmod",
            "procps",
            "grep",
            "sed",
            "findutils",
            "iproute2",
            "python3-minimal",
            "libpython3-stdlib",
            "git",
            "libgcc-s1",
            "libstdc++6",
            "base-passwd",
            "gcc",
            "g++",
            "libc6-dev",
            "libc-bin",
            "libucx-dev",
            "ucx-utils",
            "libfabric-dev",
            "libfabric-bin",
            "ibverbs-providers",
            "openmpi-bin",
            "libopenmpi-dev",
            "mpich",
            "libmpich-dev",
            "python3-mpi4py",
            "python3-numpy",
            "default-jdk-headless",
            "libjemalloc2",
            "libtcmalloc-minimal4t64",
            "valgrind",
            "gdb",
        ],
        links: &[
            ("usr/bin/java", "../lib/jvm/default-java/bin/java"),
            ("usr/bin/javac", "../lib/jvm/default-java/bin/javac"),
            (
                "usr/lib/aarch64-linux-gnu/libblas.so.3",
                "blas/libblas.so.3",
            ),
            (
                "usr/lib/aarch64-linux-gnu/liblapack.so.3",
                "lapack/liblapack.so.3",
            ),
        ],
    }),
};
