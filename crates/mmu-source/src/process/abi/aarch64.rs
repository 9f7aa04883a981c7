//! The calls of aarch64 and of 32-bit ARM.

use super::{Call, Row};

/// `AUDIT_ARCH_AARCH64`.
pub(in super::super) const ARCH_NATIVE: u32 = 0xc000_00b7;
/// `AUDIT_ARCH_ARM`.
pub(in super::super) const ARCH_COMPAT: u32 = 0x4000_0028;
/// There is no x32.
pub(in super::super) const X32_BIT: u64 = 0;
pub(super) const X32_OWN: u64 = 0;
pub(super) const X32_CALLS: &[Row] = &[];

/// aarch64 has no `fork` and `vfork` calls: libc uses `clone`.
pub(super) const OWN: &[Row] = &[];

/// The calls of 32-bit ARM programs (EABI), which has no `ipc` and no old `mmap`.
pub(in super::super) const COMPAT: &[Row] = &[
    (2, Call::Fork),
    (45, Call::Brk),
    (91, Call::Munmap),
    (120, Call::Clone),
    (125, Call::Mprotect),
    (163, Call::Mremap),
    (192, Call::Mmap),
    (220, Call::Madvise),
    (253, Call::RemapFilePages),
    (305, Call::Shmat),
    (306, Call::Shmdt),
    (319, Call::Mbind),
    (344, Call::MovePages),
    (394, Call::PkeyMprotect),
    (400, Call::MigratePages),
    (435, Call::Clone3),
    (440, Call::ProcessMadvise),
    (448, Call::ProcessMrelease),
];
