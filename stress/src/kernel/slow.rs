//! Additional BPF programs at the source's tracepoint, which delay a change there. So they lengthen
//! the time in which the hunts find races: between the tracepoint and the kernel's next step.
//!
//! The programs run after the source's program, because they are attached later.
//!
//! # Safety
//! `bpf(2)` gets attributes with their size. The data to which the attributes point outlives the
//! call.

#![allow(unsafe_code, reason = "makes raw system calls; see its Safety section")]
#![allow(dead_code, reason = "the hunts use one part, a bench the other")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// How often the delay loop runs, which takes some 30 us on a processor of 3 GHz. The verifier
/// checks each iteration of the loop.
const TURNS: i32 = 100_000;
/// How many bytes each copy copies. The copies delay one thread by some milliseconds.
const COPIED: u32 = 1 << 20;
/// The number of copies.
const COPIES: usize = 8;

/// A program that runs at the tracepoint until this value is dropped.
pub(super) struct Slow(#[expect(dead_code, reason = "it is only kept open")] OwnedFd);

/// Returns a `struct bpf_insn`: code, registers (destination in the lower half), offset, immediate.
fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> u64 {
    u64::from(code)
        | u64::from(registers) << 8
        | u64::from(offset as u16) << 16
        | u64::from(immediate as u32) << 32
}

impl Slow {
    /// Attaches a program that does nothing, to measure the cost that every program has.
    pub(super) fn not_at_all() -> io::Result<Self> {
        attach(&[instruction(0xb7, 0, 0, 0), instruction(0x95, 0, 0, 0)])
    }

    /// Delays each change of each process with a virtual machine.
    pub(super) fn every_client() -> io::Result<Self> {
        attach(&[
            instruction(0xb7, 1, 0, TURNS),
            instruction(0x17, 1, 0, 1),
            instruction(0x55, 1, -2, 0),
            instruction(0xb7, 0, 0, 0),
            instruction(0x95, 0, 0, 0),
        ])
    }

    /// Delays each change of this thread, and of no other thread. So the source is not delayed when
    /// it reads its count, although that read makes a change as well.
    pub(super) fn this_thread() -> io::Result<Self> {
        const GET_CURRENT_PID_TGID: i32 = 14;
        const PROBE_READ_KERNEL: i32 = 113;
        let room = bpf(0, &[(0, 2), (4, 4), (8, COPIED), (12, 1)])?;
        // SAFETY: the call has no preconditions.
        let own = unsafe { libc::gettid() };
        let mut code = vec![
            instruction(0x85, 0, 0, GET_CURRENT_PID_TGID),
            // The lower half is the thread id.
            instruction(0x67, 0, 0, 32),
            instruction(0x77, 0, 0, 32),
            instruction(0x15, 0, 2, own),
            instruction(0xb7, 0, 0, 0),
            instruction(0x95, 0, 0, 0),
            // r6 = the address of the map's value.
            instruction(0x18, 0x26, 0, room.as_raw_fd()),
            instruction(0, 0, 0, 0),
        ];
        for _ in 0..COPIES {
            code.extend([
                instruction(0xbf, 0x61, 0, 0),
                instruction(0xb7, 2, 0, COPIED as i32),
                instruction(0xbf, 0x63, 0, 0),
                instruction(0x85, 0, 0, PROBE_READ_KERNEL),
            ]);
        }
        code.extend([instruction(0xb7, 0, 0, 0), instruction(0x95, 0, 0, 0)]);
        attach(&code)
    }
}

fn attach(code: &[u64]) -> io::Result<Slow> {
    const RAW_TRACEPOINT: u32 = 17;
    let low = |address: usize| address as u32;
    let high = |address: usize| (address as u64 >> 32) as u32;
    let (at, licence) = (code.as_ptr().expose_provenance(), c"Dual MIT/GPL");
    let text = licence.as_ptr().expose_provenance();
    let program = bpf(
        5,
        &[
            (0, RAW_TRACEPOINT),
            (4, code.len() as u32),
            (8, low(at)),
            (12, high(at)),
            (16, low(text)),
            (20, high(text)),
        ],
    )?;
    let name = c"kvm_unmap_hva_range".as_ptr().expose_provenance();
    let fields = [
        (0, low(name)),
        (4, high(name)),
        (8, program.as_raw_fd() as u32),
    ];
    bpf(17, &fields).map(Slow)
}

/// Runs a command of `bpf(2)` that makes a descriptor. `fields` are the 32-bit words of the
/// attributes, each with its byte offset.
fn bpf(command: u32, fields: &[(usize, u32)]) -> io::Result<OwnedFd> {
    let mut attributes = [0_u32; 32];
    for (offset, value) in fields {
        attributes[offset / 4] = *value;
    }
    // SAFETY: the call gets the attributes with their size. The callers keep the data to which the
    // attributes point until this function returns (see the module docs).
    let made = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_mut_ptr(),
            size_of_val(&attributes),
        )
    };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(made as i32) })
}
