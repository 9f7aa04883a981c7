//! The known code of one address space.

use std::collections::HashMap;
use std::sync::Arc;

use framehop::{ExplicitModuleSectionInfo, FrameAddress, Module, Unwinder};
use mmu_source::process::{Current, Registers};

use super::guard::guarded;
use super::image::Images;
use super::machine::{self, Cache, Machine};
use super::memory::Memory;
use super::{Address, Scratch};
use crate::capture::ioctl::Which;
use crate::capture::place::Place;

/// The code of one address space.
#[derive(Default)]
pub(super) struct Space {
    unwinder: Machine<Arc<[u8]>>,
    cache: Cache,
    /// In order of address, not overlapping.
    parts: Vec<Part>,
    /// The indices of the stacks that were taken since code was last forgotten.
    pub(super) known: HashMap<Box<[u64]>, u32>,
}

/// A mapping with code.
#[derive(Clone, Copy, Debug)]
struct Part {
    start: u64,
    end: u64,
    image: u32,
    /// The process's address minus the file's own address.
    bias: u64,
    has_module: bool,
}

/// How many bytes of code are read to find out how a function without unwind tables returns.
const LONGEST_RETURN: usize = 32;
/// The maximum number of frames; a deeper stack is cut, and marked as partial.
pub(super) const DEEPEST: usize = 256;

impl Space {
    /// Writes the addresses of the frames to `scratch`, the innermost first.
    pub(super) fn unwind(
        &mut self,
        images: &mut Images,
        place: &mut Place,
        current: &Current,
        registers: Registers,
        scratch: &mut Scratch,
    ) {
        let memory = &mut scratch.memory;
        memory.begin(registers.sp, |at, buffer| current.read_memory(at, buffer));
        // Each iteration ends the unwinding, or adds a part of the code that was unknown.
        for _ in 0..DEEPEST {
            let frames = &mut scratch.frames;
            frames.clear();
            // A malformed file could make the unwinder panic.
            let unknown = guarded(|| self.walk(current, registers, memory, frames)).flatten();
            let Some(unknown) = unknown else { break };
            if !self.learn(images, place, current, unknown) {
                break;
            }
        }
        if scratch.frames.is_empty() {
            scratch.frames.push(registers.ip);
        }
    }

    /// Writes the addresses of the frames to `frames`. Stops at an address that no known part
    /// holds, and returns that address.
    fn walk(
        &mut self,
        current: &Current,
        registers: Registers,
        memory: &mut Memory,
        frames: &mut Vec<u64>,
    ) -> Option<u64> {
        let Space {
            unwinder,
            cache,
            parts,
            ..
        } = self;
        let mut read = |address: u64| {
            memory
                .word(address, |at, buffer| current.read_memory(at, buffer))
                .ok_or(())
        };
        let mut now = machine::start(&registers);
        let mut frame = FrameAddress::from_instruction_pointer(registers.ip);
        loop {
            // The instruction of the call: a system call's, or that of a call of a function. The
            // instruction after it may belong to another function.
            let address = frame.address().saturating_sub(1);
            let Some(part) = part_of(parts, address) else {
                return Some(address);
            };
            frames.push(address);
            if frames.len() == DEEPEST {
                return None;
            }
            let mut left = None;
            if !part.has_module {
                let mut code = [0; LONGEST_RETURN];
                let count = current.read_memory(frame.address(), &mut code);
                let is_innermost = frames.len() == 1;
                left = machine::leave(&code[..count], is_innermost, &mut now, &mut read);
            }
            let next = match left {
                Some(next) => Some(next),
                None => unwinder
                    .unwind_frame(frame, &mut now, cache, &mut read)
                    .ok()?,
            };
            frame = FrameAddress::from_return_address(next?)?;
        }
    }

    /// Looks up the mapping at `address` and adds it as a part, even if its code is unknown.
    ///
    /// `false` if nothing is mapped there: then the unwinding has gone wrong, and only the frames
    /// so far are valid.
    fn learn(
        &mut self,
        images: &mut Images,
        place: &mut Place,
        current: &Current,
        address: u64,
    ) -> bool {
        let Some(vma) = place.mapping(address, Which::Holding) else {
            return false;
        };
        // Even where the maps are stale, parts must not overlap.
        self.forget(vma.start, vma.end.into());
        let found = guarded(|| images.of(&vma, current)).flatten();
        let Some((image, bias)) = found else {
            let image = images.anonymous(&vma.name, current.task.pid, vma.start);
            self.insert(Part {
                start: vma.start,
                end: vma.end,
                image,
                bias: 0,
                has_module: false,
            });
            return true;
        };
        let sections = images.list[image as usize].sections.clone();
        let span = |section: &Option<(u64, Arc<[u8]>)>| {
            section
                .as_ref()
                .map(|(at, data)| *at..at.saturating_add(data.len() as u64))
        };
        let info = ExplicitModuleSectionInfo {
            base_svma: 0,
            text_svma: sections.text.map(|(at, size)| at..at.saturating_add(size)),
            eh_frame_svma: span(&sections.eh_frame),
            eh_frame: sections.eh_frame.map(|(_, data)| data),
            eh_frame_hdr_svma: span(&sections.eh_frame_hdr),
            eh_frame_hdr: sections.eh_frame_hdr.map(|(_, data)| data),
            ..ExplicitModuleSectionInfo::default()
        };
        self.unwinder
            .add_module(Module::new(String::new(), vma.start..vma.end, bias, info));
        self.insert(Part {
            start: vma.start,
            end: vma.end,
            image,
            bias,
            has_module: true,
        });
        true
    }

    fn insert(&mut self, part: Part) {
        let at = self.parts.partition_point(|other| other.start < part.start);
        self.parts.insert(at, part);
    }

    /// Forgets the code in a range.
    pub(super) fn forget(&mut self, start: u64, end: u128) {
        let first = self.parts.partition_point(|part| part.end <= start);
        let last = self
            .parts
            .partition_point(|part| u128::from(part.start) < end);
        if first >= last {
            return;
        }
        for part in self.parts.drain(first..last).filter(|part| part.has_module) {
            self.unwinder.remove_module(part.start);
        }
        self.known.clear();
    }

    /// The image of a frame's address, and the address in the image. The image is `u32::MAX` if no
    /// known part holds the address.
    pub(super) fn address(&self, at: u64) -> Address {
        match part_of(&self.parts, at) {
            Some(part) => Address {
                image: part.image,
                at: at - part.bias,
            },
            None => Address {
                image: u32::MAX,
                at,
            },
        }
    }
}

fn part_of(parts: &[Part], address: u64) -> Option<&Part> {
    let at = parts.partition_point(|part| part.end <= address);
    parts.get(at).filter(|part| part.start <= address)
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space")
            .field("parts", &self.parts)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_and_forgotten_by_address() {
        let mut space = Space::default();
        for start in [0x3000, 0x1000] {
            space.insert(Part {
                start,
                end: start + 0x1000,
                image: start as u32,
                bias: 0x1000,
                has_module: false,
            });
        }
        assert_eq!(
            space.address(0x3010),
            Address {
                image: 0x3000,
                at: 0x2010
            }
        );
        assert_eq!(space.address(0x2fff).image, u32::MAX);
        space.known.insert([1].into(), 1);
        space.forget(0x2000, 0x3000);
        assert_eq!((space.parts.len(), space.known.len()), (2, 1));
        space.forget(0x3fff, 1 << 64);
        assert_eq!((space.parts.len(), space.known.len()), (1, 0));
    }
}
