//! The stacks of calls: taken while a task is stopped before its call, and named after the end of
//! the trace.
//!
//! A stack is unwound at once, with the program's unwind tables (`.eh_frame`) or its frame
//! pointers. A copy of each stack for later would cost more: most stacks repeat an earlier one, and
//! of a repeated stack only the index is stored. A frame is stored as a file and an address by the
//! file's ELF headers, so that programs with a common library share its stacks.

mod aside;
mod bounded;
#[cfg(any(test, fuzzing))]
pub(crate) mod corrupt;
mod guard;
mod image;
#[cfg(target_arch = "aarch64")]
#[path = "stacks/machine/aarch64.rs"]
mod machine;
#[cfg(target_arch = "x86_64")]
#[path = "stacks/machine/x86_64.rs"]
mod machine;
mod memory;
mod runtime;
mod signed;
mod site;
mod space;
mod symbols;

use std::collections::HashMap;

use mmu_source::process::{Task, current};

use self::image::Images;
use self::memory::Memory;
pub(crate) use self::site::{Frame, Resolved, Stack};
use self::space::Space;
use crate::capture::Capture;
use crate::record::{Kind, Record};

/// An address in a mapped file, or in memory without a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Address {
    image: u32,
    /// The address by the file's ELF headers: the process's address minus the bias. For memory
    /// without a file, the process's address.
    at: u64,
}

/// Takes stacks.
#[derive(Debug)]
pub(crate) struct Stacks {
    /// Functions that are never the place of a call.
    skip: Vec<String>,
    images: Images,
    spaces: HashMap<u64, Space>,
    /// Each distinct stack, the innermost frame first.
    stacks: HashMap<Box<[Address]>, u32>,
    scratch: Scratch,
}

/// Buffers that every unwinding reuses.
#[derive(Debug, Default)]
struct Scratch {
    memory: Memory,
    frames: Vec<u64>,
}

impl Stacks {
    pub(crate) fn new(skip: Vec<String>) -> Stacks {
        Stacks {
            skip,
            images: Images::default(),
            spaces: HashMap::new(),
            stacks: HashMap::new(),
            scratch: Scratch::default(),
        }
    }

    /// Updates the known code of address spaces from a record, after [`Stacks::take`].
    pub(crate) fn follow(&mut self, record: &Record) {
        match record.kind {
            Kind::MmRelease => drop(self.spaces.remove(&record.mm)),
            // Forget the range; new mappings there are looked up when an unwinding reaches them.
            // Only calls that unmap can replace the file at an address.
            Kind::Start(span) if span.event == crate::events::UNMAP => {
                if let Some(space) = self.spaces.get_mut(&record.mm) {
                    space.forget(span.start(), span.end());
                }
            }
            _ => {}
        }
    }

    /// The index of the stack of `task`, which is stopped before a call; `None` if it cannot be
    /// taken.
    pub(crate) fn take(&mut self, task: Task, capture: &mut Capture) -> Option<u32> {
        let current = current()?;
        let registers = current.registers()?;
        let mm = capture.mm(task.tid)?;
        if registers.is_32bit {
            return None;
        }
        let space = self.spaces.entry(mm).or_default();
        let place = capture.place(task.tid, mm)?;
        space.unwind(
            &mut self.images,
            place,
            &current,
            registers,
            &mut self.scratch,
        );
        let frames = &self.scratch.frames;
        if let Some(number) = space.known.get(&frames[..]) {
            return Some(*number);
        }
        let addresses: Box<[Address]> = frames.iter().map(|at| space.address(*at)).collect();
        let next = self.stacks.len() as u32;
        let number = *self.stacks.entry(addresses).or_insert(next);
        space.known.insert(frames[..].into(), number);
        Some(number)
    }

    /// Names every frame.
    pub(crate) fn resolve(self) -> Resolved {
        let mut wanted: Vec<Address> = self
            .stacks
            .keys()
            .flat_map(|stack| stack.iter().copied())
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        let named = symbols::name(&self.images, &wanted);
        let mut list: Vec<(u32, Box<[Address]>)> = self
            .stacks
            .into_iter()
            .map(|(stack, number)| (number, stack))
            .collect();
        list.sort_unstable_by_key(|(number, _)| *number);
        let frames = |stack: &[Address]| -> Vec<Frame> {
            stack
                .iter()
                .flat_map(|address| named.get(address).into_iter().flatten().cloned())
                .collect()
        };
        let is_partial = |stack: &[Address]| {
            let image = |address: &Address| self.images.list.get(address.image as usize);
            stack.len() == space::DEEPEST
                || stack.iter().filter_map(image).any(|image| image.is_partial)
        };
        Resolved::new(
            list.iter()
                .map(|(number, stack)| (*number, frames(stack), is_partial(stack))),
            &self.skip,
        )
    }
}
