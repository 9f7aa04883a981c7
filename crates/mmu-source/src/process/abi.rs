//! The system calls that matter, and their numbers under each ABI a task can use.

/// A system call that changes translations of some address space, or can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Call {
    Munmap,
    Mremap,
    Brk,
    Mmap,
    /// The i386 `mmap`, with its six arguments in memory.
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

/// How a system call passes its number and what its structures look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Abi {
    /// The ABI of this program: 64-bit numbers, 64-bit structures.
    Native,
    /// x86-64 instructions with 32-bit pointers in structures; numbers carry [`X32_BIT`].
    X32,
    /// 32-bit x86: `int 0x80`, `sysenter`, and `syscall` in compatibility mode.
    I386,
}

impl Abi {
    /// Finds the ABI of a call from its `AUDIT_ARCH_*` value and its number, and the number without
    /// any mark of the ABI.
    pub(super) fn of(arch: u32, number: u64) -> Option<(Abi, u64)> {
        match arch {
            ARCH_NATIVE if cfg!(target_arch = "x86_64") && number & X32_BIT != 0 && number < 2 * X32_BIT => {
                Some((Abi::X32, number & !X32_BIT))
            }
            ARCH_NATIVE => Some((Abi::Native, number)),
            ARCH_I386 if cfg!(target_arch = "x86_64") => Some((Abi::I386, number)),
            _ => None,
        }
    }

    /// Finds the call that `number` names.
    pub(super) fn call(self, number: u64) -> Option<Call> {
        let table = match self {
            Abi::Native => NATIVE,
            Abi::X32 if number >= X32_OWN => {
                return X32_CALLS.iter().find(|(nr, _)| u64::from(*nr) == number).map(|c| c.1);
            }
            Abi::X32 => NATIVE,
            Abi::I386 => I386,
        };
        table.iter().find(|(nr, _)| u64::from(*nr) == number).map(|(_, call)| *call)
    }

    /// Tells whether pointers and sizes in structures are 32 bits wide.
    pub(super) fn is_compat(self) -> bool {
        self != Abi::Native
    }
}

/// `AUDIT_ARCH_*` of this program.
pub(super) const ARCH_NATIVE: u32 = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };
/// `AUDIT_ARCH_I386`.
pub(super) const ARCH_I386: u32 = 0x4000_0003;
/// `__X32_SYSCALL_BIT`.
pub(super) const X32_BIT: u64 = 0x4000_0000;
/// The first number that means another call under x32 than under x86-64.
const X32_OWN: u64 = 512;

/// A call and its number.
type Row = (u32, Call);

const fn row(number: libc::c_long, call: Call) -> Row {
    (number as u32, call)
}

/// The calls of this program's own ABI.
pub(super) const NATIVE: &[Row] = &[
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
    #[cfg(target_arch = "x86_64")]
    row(libc::SYS_fork, Call::Fork),
    row(libc::SYS_clone, Call::Clone),
    row(libc::SYS_clone3, Call::Clone3),
];

/// The calls of x32 that have numbers of their own.
const X32_CALLS: &[Row] = &[(533, Call::MovePages)];

/// The calls of i386.
pub(super) const I386: &[Row] = &[
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

/// `IPCOP_shmat`, the low half of the first argument of `ipc`.
pub(super) const IPC_SHMAT: u64 = 21;
/// `IPCOP_shmdt`.
pub(super) const IPC_SHMDT: u64 = 22;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_abi_finds_its_calls_and_the_x32_bit_is_taken_off() {
        assert_eq!(Abi::of(ARCH_NATIVE, libc::SYS_munmap as u64), Some((Abi::Native, libc::SYS_munmap as u64)));
        assert_eq!(Abi::Native.call(libc::SYS_munmap as u64), Some(Call::Munmap));
        assert_eq!(Abi::Native.call(533), None);
        assert_eq!(Abi::of(0x1234, 0), None);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn i386_and_x32_have_numbers_of_their_own() {
        assert_eq!(Abi::of(ARCH_NATIVE, X32_BIT | 533), Some((Abi::X32, 533)));
        assert_eq!(Abi::X32.call(533), Some(Call::MovePages));
        assert_eq!(Abi::of(ARCH_I386, 91), Some((Abi::I386, 91)));
        assert_eq!(Abi::I386.call(91), Some(Call::Munmap));
        assert_eq!(Abi::of(ARCH_NATIVE, u64::MAX), Some((Abi::Native, u64::MAX)));
    }
}
