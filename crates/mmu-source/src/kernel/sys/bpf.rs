//! The commands of `bpf(2)`.

use super::owned;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// The kinds of BPF maps in use, `enum bpf_map_type`.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum Map {
    /// One value. User space may map it.
    Value { bytes: u32 },
    /// One value that only programs access.
    Private { bytes: u32 },
    /// A ring of records, whose size is a power of two.
    Ring { bytes: u32 },
}

/// `union bpf_attr`. The kernel requires unused bytes to be zero.
#[repr(C, align(8))]
struct Attributes([u32; 32]);

impl Attributes {
    const fn new() -> Self {
        Self([0; 32])
    }

    /// Sets 32 bits at a byte offset.
    fn word(mut self, offset: usize, value: u32) -> Self {
        self.0[offset / 4] = value;
        self
    }

    /// Sets a pointer at a byte offset.
    fn pointer<T: ?Sized>(self, offset: usize, value: *const T) -> Self {
        let address = value.cast::<u8>().addr() as u64;
        let _ = value.cast::<u8>().expose_provenance();
        self.word(offset, address as u32)
            .word(offset + 4, (address >> 32) as u32)
    }

    fn call(&mut self, command: u32) -> io::Result<i32> {
        // SAFETY: the call gets the size of the attributes, which outlive the call. The callers of
        // this function borrow the targets of all pointers in the attributes until the call
        // returns.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command,
                &raw mut self.0,
                size_of_val(&self.0),
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result as i32)
        }
    }
}

pub(in super::super) fn create_map(map: Map) -> io::Result<OwnedFd> {
    const BPF_F_MMAPABLE: u32 = 1 << 10;
    let attributes = match map {
        Map::Value { bytes } => Attributes::new()
            .word(0, 2)
            .word(4, 4)
            .word(8, bytes)
            .word(12, 1)
            .word(16, BPF_F_MMAPABLE),
        Map::Private { bytes } => Attributes::new()
            .word(0, 2)
            .word(4, 4)
            .word(8, bytes)
            .word(12, 1),
        Map::Ring { bytes } => Attributes::new().word(0, 27).word(12, bytes),
    };
    let mut attributes = attributes;
    owned(attributes.call(0)?)
}

/// The types of BPF programs in use, `enum bpf_prog_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Kind {
    RawTracepoint = 17,
    /// Runs only on request: see `run_program`.
    Syscall = 31,
}

/// Makes the kernel verify and compile `program`. If the verifier rejects the program, the error
/// contains the end of its log.
pub(in super::super) fn load_program(kind: Kind, program: &[u64]) -> io::Result<OwnedFd> {
    const BPF_F_SLEEPABLE: u32 = 1 << 4;
    let license = c"Dual MIT/GPL";
    let build = || {
        Attributes::new()
            .word(0, kind as u32)
            .word(
                44,
                if kind == Kind::Syscall {
                    BPF_F_SLEEPABLE
                } else {
                    0
                },
            )
            .word(4, program.len() as u32)
            .pointer(8, program.as_ptr())
            .pointer(16, license.as_ptr())
    };
    // `EAGAIN`: a signal, or the completion of an io_uring request of this thread, interrupted the
    // verifier.
    let is_interrupted = |result: &io::Result<_>| {
        result
            .as_ref()
            .is_err_and(|error: &io::Error| error.kind() == io::ErrorKind::WouldBlock)
    };
    let mut loaded = build().call(5);
    for _ in 0..20 {
        if !is_interrupted(&loaded) {
            break;
        }
        loaded = build().call(5);
    }
    let error = match loaded {
        Ok(descriptor) => return owned(descriptor),
        Err(error) => error,
    };
    if crate::error::exhausted(&error).is_some() {
        // The verifier did not reject the program, and adding its log would lose the errno.
        return Err(error);
    }
    let mut log = vec![0_u8; 1 << 20];
    if build()
        .word(24, 1)
        .word(28, log.len() as u32)
        .pointer(32, log.as_mut_ptr())
        .call(5)
        .is_err()
    {
        let text = CStr::from_bytes_until_nul(&log)
            .map(CStr::to_string_lossy)
            .unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(4).collect();
        if !lines.is_empty() {
            let lines: Vec<&str> = lines.into_iter().rev().collect();
            return Err(io::Error::new(
                error.kind(),
                format!("{error}: {}", lines.join("; ")),
            ));
        }
    }
    Err(error)
}

/// Attaches a program to a tracepoint, for as long as the returned descriptor is open.
pub(in super::super) fn attach(program: BorrowedFd<'_>, tracepoint: &CStr) -> io::Result<OwnedFd> {
    owned(
        Attributes::new()
            .pointer(0, tracepoint.as_ptr())
            .word(8, program.as_raw_fd() as u32)
            .call(17)?,
    )
}

/// Runs a program once, on this thread. A raw tracepoint program gets `arguments` as if the
/// tracepoint had passed them. Returns the program's return value.
pub(in super::super) fn run_program(
    program: BorrowedFd<'_>,
    mut arguments: [u64; 2],
) -> io::Result<u32> {
    let attributes = Attributes::new().word(0, program.as_raw_fd() as u32);
    let mut attributes = attributes
        .word(40, size_of_val(&arguments) as u32)
        .pointer(48, arguments.as_mut_ptr());
    attributes.call(10)?;
    Ok(attributes.0[1])
}

/// Returns how often the kernel skipped a program because its processor was already running it.
pub(in super::super) fn missed_runs(program: BorrowedFd<'_>) -> io::Result<u64> {
    /// `recursion_misses` in `struct bpf_prog_info` (Linux 5.12).
    const RECURSION_MISSES: usize = 208;
    let mut info = [0_u64; 32];
    let attributes = Attributes::new().word(0, program.as_raw_fd() as u32);
    attributes
        .word(4, size_of_val(&info) as u32)
        .pointer(8, info.as_mut_ptr())
        .call(15)?;
    Ok(info[RECURSION_MISSES / 8])
}

/// The kernel's id of a BPF object. The id stays valid as long as a reference to the object exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Object {
    Program(u32),
    Map(u32),
}

/// Returns the kernel's id of a program or map.
pub(in super::super) fn number(object: BorrowedFd<'_>) -> io::Result<u32> {
    // Both `bpf_prog_info` and `bpf_map_info` begin with the type and the id.
    let mut info = [0_u32; 2];
    let attributes = Attributes::new().word(0, object.as_raw_fd() as u32);
    attributes
        .word(4, size_of_val(&info) as u32)
        .pointer(8, info.as_mut_ptr())
        .call(15)?;
    Ok(info[1])
}

/// Tells whether an object still exists. The look-up needs CAP_SYS_ADMIN; without it the answer is
/// false.
pub(in super::super) fn exists(object: Object) -> bool {
    let (command, number) = match object {
        Object::Program(number) => (13, number),
        Object::Map(number) => (14, number),
    };
    Attributes::new()
        .word(0, number)
        .call(command)
        .and_then(owned)
        .is_ok()
}
