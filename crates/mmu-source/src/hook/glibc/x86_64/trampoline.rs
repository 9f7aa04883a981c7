//! Trampolines: the code between a patched instruction and the code after its `syscall`.

use super::super::handler::IS_HOOKED;
use super::call_handler;
use super::scan::{Code64, Found, PATCH};
use std::ptr;

/// Returns a jump from `from` to `to`, or `None` if `to` is out of reach.
pub(in crate::hook::glibc) fn branch(from: u64, to: u64) -> Option<[u8; PATCH]> {
    let distance = to.wrapping_sub(from + PATCH as u64) as i64;
    let mut jump = [0xe9; PATCH];
    jump[1..].copy_from_slice(&i32::try_from(distance).ok()?.to_le_bytes());
    Some(jump)
}

/// Returns the trampoline of a site. The trampoline works at any address. Returns `None` if no stub
/// knows the registers of this processor.
pub(in crate::hook::glibc) fn trampoline(
    _: u64,
    found: &Found,
    code: Code64<'_>,
) -> Option<Vec<u8>> {
    const SYSCALL: u64 = 2;
    let stub = call_handler::stub(found.keep)?;
    let offset = |address: u64| (address - code.start) as usize;
    let moved = &code.bytes[offset(found.address)..offset(found.syscall)];
    Some(of_call(
        moved,
        found.number.is_none(),
        stub,
        found.syscall + SYSCALL,
    ))
}

/// Returns the trampoline for a function whose entry another program has patched with a jump. The
/// trampoline calls the target of that jump.
pub(in crate::hook::glibc) fn chain(number: u32, foreign: Foreign) -> Vec<u8> {
    of_function(number, foreign, call_handler::function)
}

/// Returns a trampoline that runs the instructions `moved`, makes the call through `stub`, and
/// continues at `resume`.
fn of_call(moved: &[u8], is_generic: bool, stub: unsafe extern "C" fn(), resume: u64) -> Vec<u8> {
    let mut code = Vec::from(moved);
    if is_generic {
        // cmp $512, %rax; jae plain; mov $table, %r11; cmpb $0, (%r11, %rax); je plain. The code
        // after a generic call does not need the flags and r11.
        let hooked = 5 + 6 + 8 + 6;
        code.extend([0x48, 0x3d]);
        code.extend((IS_HOOKED.len() as u32).to_le_bytes());
        code.extend([0x73, 10 + 5 + 2 + hooked, 0x49, 0xbb]);
        code.extend(ptr::from_ref(&IS_HOOKED).expose_provenance().to_le_bytes());
        code.extend([0x41, 0x80, 0x3c, 0x03, 0x00, 0x74, hooked]);
    }
    // lea -128(%rsp), %rsp: skips the red zone without changing the flags.
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
    fill(code, stub, resume)
}

/// Returns a trampoline for a function whose entry another program has patched with a jump. The
/// trampoline calls the target of that jump through `stub`.
fn of_function(number: u32, foreign: Foreign, stub: unsafe extern "C" fn()) -> Vec<u8> {
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
    fill(code, stub, resume)
}

/// Appends the addresses that the code refers to.
///
/// # Panics
/// If the code is too long.
fn fill(mut code: Vec<u8>, stub: unsafe extern "C" fn(), resume: u64) -> Vec<u8> {
    assert!(code.len() <= STUB as usize, "a site is a few instructions");
    code.resize(STUB as usize, 0xcc);
    code.extend((stub as usize).to_le_bytes());
    code.extend(resume.to_le_bytes());
    code
}

/// A jump that another program has written at the entry of a function: one instruction, or two of
/// which the first is at least as long as a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hook::glibc) enum Foreign {
    /// `jmp target`.
    Direct(u64),
    /// `jmp *pointer(%rip)`: the address of the pointer.
    ByPointer(u64),
    /// `mov $target, %register`, and the address of the instruction after it.
    ByRegister { load: [u8; 10], resume: u64 },
}

impl Foreign {
    /// How many bytes of a function are examined.
    pub(in crate::hook::glibc) const LENGTH: usize = 10;

    /// Returns the address of the instruction to replace.
    pub(in crate::hook::glibc) fn place(&self, entry: u64) -> u64 {
        entry
    }

    /// Reads the jump at `entry`, if there is one.
    pub(in crate::hook::glibc) fn read(entry: u64, code: [u8; Self::LENGTH]) -> Option<Self> {
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
            // The register is rax, r10 or r11, which a function may overwrite.
            [0x48, 0xb8, ..] | [0x49, 0xba | 0xbb, ..] => Some(Foreign::ByRegister {
                load: code,
                resume: entry + 10,
            }),
            _ => None,
        }
    }
}

/// The size of a trampoline.
pub(in crate::hook::glibc) const SLOT: u64 = 128;
/// The offset of the stub's address in a trampoline.
const STUB: u32 = 112;
/// The offset of the address where the code continues.
const RESUME: u32 = 120;

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, FlowControl};

    #[allow(unsafe_code, reason = "a stub is such a function")]
    unsafe extern "C" fn stub() {}

    #[test]
    fn a_trampoline_disassembles_to_its_comments() {
        let here = stub as *const () as u64;
        let at = 0x1000;
        let bytes = of_call(&[0x90], true, stub, here);
        assert_eq!(bytes.len() as u64, SLOT);
        let code = Code64 {
            bytes: &bytes,
            start: at,
        };
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
