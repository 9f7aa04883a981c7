//! Trampolines: what stands between a patched instruction and the code behind its `syscall`.

#![allow(unsafe_code, reason = "writes code")]

use super::super::handler::CALLS;
use super::super::raw;
use mmu_notifier::PAGE_SIZE;
use std::ptr;

/// Memory for the trampolines of one module, within the reach of a near jump. Never unmapped:
/// threads may be in it.
#[derive(Debug)]
pub(in crate::hook::glibc) struct Arena {
    start: u64,
    length: u64,
    used: u64,
}

impl Arena {
    /// Maps room for `count` trampolines near `start..end`.
    pub(in crate::hook::glibc) fn near(start: u64, end: u64, count: usize) -> Option<Self> {
        /// A near jump goes 2 GiB either way; a little is left for the code itself.
        const REACH: u64 = (1 << 31) - (1 << 20);
        const STEP: u64 = 1 << 20;
        let length = (count as u64 * SLOT).next_multiple_of(PAGE_SIZE);
        let below = (1..)
            .map(|step| start.checked_sub(length + step * STEP))
            .map_while(|at| at.filter(|at| end - at < REACH));
        let above = (1..)
            .map(|step| end + step * STEP)
            .take_while(|at| at + length - start < REACH);
        let mut places = below.chain(above).map(|at| at & !(PAGE_SIZE - 1));
        let map = |at| {
            raw::mmap(
                at,
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED_NOREPLACE,
            )
        };
        places.find_map(|at| match map(at) {
            Ok(start) if start == at => Some(Self {
                start,
                length,
                used: 0,
            }),
            Ok(elsewhere) => {
                // A kernel that does not know the flag takes the address as a hint.
                // SAFETY: mapped just now, and nobody uses it.
                let _ = unsafe { raw::munmap(elsewhere, length) };
                None
            }
            Err(_) => None,
        })
    }

    /// Writes a trampoline and returns where it is. It runs `moved`, then the call by way of
    /// `stub`, then goes on at `resume`.
    ///
    /// # Panics
    /// If there is no room, or if the arena is sealed.
    pub(in crate::hook::glibc) fn add(
        &mut self,
        moved: &[u8],
        is_generic: bool,
        stub: unsafe extern "C" fn(),
        resume: u64,
    ) -> u64 {
        let mut code = Vec::from(moved);
        if is_generic {
            // cmp $512, %rax; jae plain; mov $table, %r11; cmpb $0, (%r11, %rax); je plain. Here
            // flags and r11 are free.
            let hooked = 5 + 6 + 8 + 6;
            code.extend([0x48, 0x3d]);
            code.extend((TABLE.len() as u32).to_le_bytes());
            code.extend([0x73, 10 + 5 + 2 + hooked, 0x49, 0xbb]);
            code.extend(ptr::from_ref(&TABLE).expose_provenance().to_le_bytes());
            code.extend([0x41, 0x80, 0x3c, 0x03, 0x00, 0x74, hooked]);
        }
        // lea -128(%rsp), %rsp: past the red zone, without touching flags.
        code.extend([0x48, 0x8d, 0x64, 0x24, 0x80]);
        // call *stub; lea 128(%rsp), %rsp; jmp *resume.
        code.extend([0xff, 0x15]);
        code.extend((STUB - code.len() as u32 - 4).to_le_bytes());
        code.extend([0x48, 0x8d, 0xa4, 0x24, 0x80, 0, 0, 0]);
        code.extend([0xff, 0x25]);
        code.extend((RESUME - code.len() as u32 - 4).to_le_bytes());
        if is_generic {
            // plain: syscall; jmp *resume.
            code.extend([0x0f, 0x05, 0xff, 0x25]);
            code.extend((RESUME - code.len() as u32 - 4).to_le_bytes());
        }
        self.place(code, stub, resume)
    }

    /// Writes a trampoline for the entry of a function that somebody else has put a jump at, and
    /// returns where it is. It calls what they jump to, by way of `stub`.
    ///
    /// # Panics
    /// If there is no room.
    pub(in crate::hook::glibc) fn add_chain(
        &mut self,
        number: u32,
        foreign: Foreign,
        stub: unsafe extern "C" fn(),
    ) -> u64 {
        // mov $number, %eax; lea foreign(%rip), %r11; jmp *stub; foreign:
        let mut code = vec![0xb8];
        code.extend(number.to_le_bytes());
        code.extend([0x4c, 0x8d, 0x1d, 6, 0, 0, 0, 0xff, 0x25]);
        code.extend((STUB - code.len() as u32 - 4).to_le_bytes());
        let resume = match foreign {
            Foreign::Direct(target) => target,
            Foreign::ByPointer(pointer) => {
                // mov $pointer, %r11; jmp *(%r11).
                code.extend([0x49, 0xbb]);
                code.extend(pointer.to_le_bytes());
                code.extend([0x41, 0xff, 0x23]);
                pointer
            }
            Foreign::ByRegister { load, resume } => {
                code.extend(load);
                resume
            }
        };
        // jmp *resume.
        code.extend([0xff, 0x25]);
        code.extend((RESUME - code.len() as u32 - 4).to_le_bytes());
        self.place(code, stub, resume)
    }

    fn place(&mut self, mut code: Vec<u8>, stub: unsafe extern "C" fn(), resume: u64) -> u64 {
        assert!(code.len() <= STUB as usize, "a site is a few instructions");
        code.resize(STUB as usize, 0xcc);
        code.extend((stub as usize).to_le_bytes());
        code.extend(resume.to_le_bytes());
        assert!(
            self.used + SLOT <= self.length,
            "the arena was made for so many"
        );
        let at = self.start + self.used;
        self.used += SLOT;
        let to = ptr::with_exposed_provenance_mut::<u8>(at as usize);
        // SAFETY: the slot lies within the arena, which is writable until it is sealed, and nobody
        // knows of it yet.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), to, code.len()) };
        at
    }

    /// Makes the trampolines executable, and no longer writable.
    pub(in crate::hook::glibc) fn seal(self) -> Result<(), i32> {
        // SAFETY: nobody writes it any more: `add` needs the arena.
        unsafe { raw::mprotect(self.start, self.length, libc::PROT_READ | libc::PROT_EXEC) }
    }
}

/// A jump that somebody else has put at the entry of a function: one instruction, or two of which
/// the first is long enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hook::glibc) enum Foreign {
    /// `jmp target`.
    Direct(u64),
    /// `jmp *pointer(%rip)`: where the pointer is.
    ByPointer(u64),
    /// `mov $target, %register`, and what follows.
    ByRegister { load: [u8; 10], resume: u64 },
}

impl Foreign {
    /// Reads the jump at `entry`, if there is one.
    pub(in crate::hook::glibc) fn at(entry: u64, code: [u8; 10]) -> Option<Self> {
        let displacement = |from: usize| {
            i32::from_le_bytes(code[from..from + 4].try_into().expect("four bytes")) as i64 as u64
        };
        match code {
            [0xe9, ..] => Some(Foreign::Direct(
                entry.wrapping_add(5).wrapping_add(displacement(1)),
            )),
            [0xff, 0x25, ..] => Some(Foreign::ByPointer(
                entry.wrapping_add(6).wrapping_add(displacement(2)),
            )),
            // To rax, r10 or r11, which a function may destroy.
            [0x48, 0xb8, ..] | [0x49, 0xba | 0xbb, ..] => Some(Foreign::ByRegister {
                load: code,
                resume: entry + 10,
            }),
            _ => None,
        }
    }
}

/// Bytes of a trampoline.
const SLOT: u64 = 128;
/// Where in it the address of the stub is kept.
const STUB: u32 = 112;
/// Where in it the address to go on at is kept.
const RESUME: u32 = 120;

/// Which numbers `syscall(2)` hands to the stub.
static TABLE: [bool; 512] = {
    let mut table = [false; 512];
    let mut at = 0;
    while at < CALLS.len() {
        table[CALLS[at].0 as usize] = true;
        at += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::super::scan::Code64;
    use super::*;
    use iced_x86::{Code, FlowControl};

    unsafe extern "C" fn stub() {}

    #[test]
    fn an_arena_is_in_reach_and_executable_only_when_sealed() {
        let here = stub as *const () as u64;
        let mut arena = Arena::near(here, here + 4096, 3).expect("there is room");
        let first = arena.add(&[0x90], false, stub, here);
        let second = arena.add(&[0x90], true, stub, here);
        assert_eq!(second - first, SLOT);
        assert!(first.abs_diff(here) < 1 << 31, "{first:x} {here:x}");
        arena.seal().expect("it can be made executable");
    }

    #[test]
    fn a_trampoline_is_what_its_comments_say() {
        let here = stub as *const () as u64;
        let mut arena = Arena::near(here, here + 4096, 1).expect("there is room");
        let at = arena.add(&[0x90], true, stub, here);
        // SAFETY: the slot was written above and is never unmapped.
        let bytes = unsafe {
            std::slice::from_raw_parts(
                ptr::with_exposed_provenance::<u8>(at as usize),
                SLOT as usize,
            )
        };
        let code = Code64 { bytes, start: at };
        let (mut ip, mut codes, mut jumps) = (at, Vec::new(), Vec::new());
        while let Some(instruction) = code.instruction_at(ip).filter(|i| i.code() != Code::Int3) {
            if instruction.flow_control() == FlowControl::ConditionalBranch {
                jumps.push(instruction.near_branch64());
            }
            if instruction.is_ip_rel_memory_operand() {
                let of = (instruction.ip_rel_memory_address() - at) as u32;
                assert!(
                    of == if instruction.code() == Code::Call_rm64 {
                        STUB
                    } else {
                        RESUME
                    },
                    "{of}"
                );
            }
            if instruction.code() == Code::Syscall {
                assert_eq!(jumps, [ip, ip]);
            }
            codes.push(instruction.code());
            ip = instruction.next_ip();
        }
        assert_eq!(codes.len(), 12, "{codes:?}");
        assert_eq!(jumps.len(), 2);
    }
}
