//! The calls of x86-64, of x32 and of i386.

use super::{Call, Row, row};

/// `AUDIT_ARCH_X86_64`.
pub(in super::super) const ARCH_NATIVE: u32 = 0xc000_003e;
/// `AUDIT_ARCH_I386`.
pub(in super::super) const ARCH_COMPAT: u32 = 0x4000_0003;
/// `__X32_SYSCALL_BIT`.
pub(in super::super) const X32_BIT: u64 = 0x4000_0000;
/// From this number on, an x32 call differs from the x86-64 call of the same number.
pub(super) const X32_OWN: u64 = 512;

/// The calls that x86-64 has and some other architectures lack.
pub(super) const OWN: &[Row] = &[row(libc::SYS_fork, Call::Fork)];

/// The x32 calls with numbers of their own.
pub(super) const X32_CALLS: &[Row] = &[(533, Call::MovePages)];

/// The calls of i386.
pub(in super::super) const COMPAT: &[Row] = &[
    (2, Call::Fork),
    (45, Call::Brk),
    (90, Call::OldMmap),
    (91, Call::Munmap),
    (117, Call::Ipc),
    (120, Call::Clone),
    (125, Call::Mprotect),
    (163, Call::Mremap),
    (192, Call::Mmap),
    (219, Call::Madvise),
    (257, Call::RemapFilePages),
    (274, Call::Mbind),
    (294, Call::MigratePages),
    (317, Call::MovePages),
    (380, Call::PkeyMprotect),
    (397, Call::Shmat),
    (398, Call::Shmdt),
    (435, Call::Clone3),
    (440, Call::ProcessMadvise),
    (448, Call::ProcessMrelease),
];
