//! The system calls that the tracer decodes, and their numbers in each ABI that a task can use.
//!
//! Each processor architecture has a file with its `AUDIT_ARCH_*` values, the calls that only it
//! has, and the calls of its 32-bit programs.

#[cfg(target_arch = "aarch64")]
#[path = "abi/aarch64.rs"]
mod machine;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[path = "abi/elsewhere.rs"]
mod machine;
#[cfg(target_arch = "x86_64")]
#[path = "abi/x86_64.rs"]
mod machine;

pub(super) use machine::{ARCH_COMPAT, ARCH_NATIVE, COMPAT, X32_BIT};
use machine::{OWN, X32_CALLS, X32_OWN};

/// A system call that can change translations of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "only i386 has `ipc` and the old `mmap`")
)]
pub(super) enum Call {
    Munmap,
    Mremap,
    Brk,
    Mmap,
    /// The i386 `mmap`, whose six arguments are in memory.
    OldMmap,
    Shmat,
    Shmdt,
    /// The i386 multiplexer of the SysV calls.
    Ipc,
    Madvise,
    ProcessMadvise,
    ProcessMrelease,
    Mprotect,
    PkeyMprotect,
    Mbind,
    MovePages,
    MigratePages,
    RemapFilePages,
    Fork,
    Clone,
    Clone3,
}

impl Call {
    /// The name of the call, as strace prints it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Call::Munmap => "munmap",
            Call::Mremap => "mremap",
            Call::Brk => "brk",
            Call::Mmap | Call::OldMmap => "mmap",
            Call::Shmat => "shmat",
            Call::Shmdt => "shmdt",
            Call::Ipc => "ipc",
            Call::Madvise => "madvise",
            Call::ProcessMadvise => "process_madvise",
            Call::ProcessMrelease => "process_mrelease",
            Call::Mprotect => "mprotect",
            Call::PkeyMprotect => "pkey_mprotect",
            Call::Mbind => "mbind",
            Call::MovePages => "move_pages",
            Call::MigratePages => "migrate_pages",
            Call::RemapFilePages => "remap_file_pages",
            Call::Fork => "fork",
            Call::Clone => "clone",
            Call::Clone3 => "clone3",
        }
    }
}

/// How a system call passes its number, and how wide the fields of its structures are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Abi {
    /// The ABI of this program: 64-bit numbers and 64-bit structures.
    Native,
    /// x32: x86-64 instructions with 32-bit pointers in structures. Numbers carry [`X32_BIT`].
    X32,
    /// The ABI of 32-bit programs: ARM, or i386 (`int 0x80`, `sysenter`, and `syscall` in
    /// compatibility mode).
    Compat,
}

impl Abi {
    /// Returns the ABI of a call, and the call's number without `X32_BIT`. `arch` is the
    /// `AUDIT_ARCH_*` value of the call. Returns `None` for any other `arch`.
    pub(super) fn of(arch: u32, number: u64) -> Option<(Abi, u64)> {
        match arch {
            ARCH_NATIVE if number & X32_BIT != 0 && number < 2 * X32_BIT => {
                Some((Abi::X32, number & !X32_BIT))
            }
            ARCH_NATIVE => Some((Abi::Native, number)),
            ARCH_COMPAT => Some((Abi::Compat, number)),
            _ => None,
        }
    }

    /// Returns the call that `number` names.
    pub(super) fn call(self, number: u64) -> Option<Call> {
        let find = |table: &[Row]| {
            table
                .iter()
                .find(|(nr, _)| u64::from(*nr) == number)
                .map(|(_, call)| *call)
        };
        match self {
            Abi::Compat => find(COMPAT),
            Abi::X32 if number >= X32_OWN => find(X32_CALLS),
            Abi::Native | Abi::X32 => find(SHARED).or_else(|| find(OWN)),
        }
    }

    /// Tells whether pointers and sizes in structures are 32 bits wide.
    pub(super) fn is_compat(self) -> bool {
        self != Abi::Native
    }
}

/// A call and its number.
pub(super) type Row = (u32, Call);

const fn row(number: libc::c_long, call: Call) -> Row {
    (number as u32, call)
}

/// The calls of this program's own ABI, unsorted.
pub(super) fn native() -> Vec<Row> {
    [SHARED, OWN].concat()
}

/// The calls that every architecture has.
const SHARED: &[Row] = &[
    row(libc::SYS_munmap, Call::Munmap),
    row(libc::SYS_mremap, Call::Mremap),
    row(libc::SYS_brk, Call::Brk),
    row(libc::SYS_mmap, Call::Mmap),
    row(libc::SYS_shmat, Call::Shmat),
    row(libc::SYS_shmdt, Call::Shmdt),
    row(libc::SYS_madvise, Call::Madvise),
    row(libc::SYS_process_madvise, Call::ProcessMadvise),
    row(libc::SYS_process_mrelease, Call::ProcessMrelease),
    row(libc::SYS_mprotect, Call::Mprotect),
    row(libc::SYS_pkey_mprotect, Call::PkeyMprotect),
    row(libc::SYS_mbind, Call::Mbind),
    row(libc::SYS_move_pages, Call::MovePages),
    row(libc::SYS_migrate_pages, Call::MigratePages),
    row(libc::SYS_remap_file_pages, Call::RemapFilePages),
    row(libc::SYS_clone, Call::Clone),
    row(libc::SYS_clone3, Call::Clone3),
];

/// `IPCOP_shmat`, the low half of the first argument of `ipc`.
pub(super) const IPC_SHMAT: u64 = 21;
/// `IPCOP_shmdt`.
pub(super) const IPC_SHMDT: u64 = 22;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_abi_finds_its_calls_and_the_x32_bit_is_taken_off() {
        assert_eq!(
            Abi::of(ARCH_NATIVE, libc::SYS_munmap as u64),
            Some((Abi::Native, libc::SYS_munmap as u64))
        );
        assert_eq!(
            Abi::Native.call(libc::SYS_munmap as u64),
            Some(Call::Munmap)
        );
        assert_eq!(Abi::Native.call(533), None);
        assert_eq!(Abi::of(0x1234, 0), None);
    }

    #[test]
    fn a_number_that_is_none_is_of_the_native_abi() {
        assert_eq!(
            Abi::of(ARCH_NATIVE, u64::MAX),
            Some((Abi::Native, u64::MAX))
        );
    }

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[test]
    fn calls_of_32_bit_programs_have_numbers_of_their_own() {
        assert_eq!(Abi::of(ARCH_COMPAT, 91), Some((Abi::Compat, 91)));
        assert_eq!(Abi::Compat.call(91), Some(Call::Munmap));
        assert_eq!(Abi::Compat.call(libc::SYS_munmap as u64), None);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn x32_has_numbers_of_its_own() {
        assert_eq!(Abi::of(ARCH_NATIVE, X32_BIT | 533), Some((Abi::X32, 533)));
        assert_eq!(Abi::X32.call(533), Some(Call::MovePages));
        assert_eq!(Abi::Native.call(libc::SYS_fork as u64), Some(Call::Fork));
    }
}
