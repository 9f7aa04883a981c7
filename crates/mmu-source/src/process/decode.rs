//! Computes from a system call's arguments the ranges that the call is about to invalidate.

use std::io;

use mmu_notifier::{Event, Va, VaRange};

use super::abi::{Abi, Call, IPC_SHMAT, IPC_SHMDT};
use super::proc::Named;
use super::space::Break;
use super::{Pid, huge_page, maps, proc, sys};
use crate::page;
use crate::ranges::{
    PROT_GROWSDOWN, UIO_MAXIOV, add, folios, is_harmful, largest_page_at, madvise, mbind, mmap,
    mremap, shmat,
};

/// A call that a task is about to make.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) tid: Pid,
    pub(super) abi: Abi,
    pub(super) call: Call,
    pub(super) args: [u64; 6],
}

/// What the tracer has to do for a call. The ranges are in the caller's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) cause: &'static str,
    pub(super) event: Event,
    pub(super) then: Then,
}

/// What a call needs in addition to brackets on its ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// Nothing more.
    Close,
    /// The call acts on the address space of the named process, which may be the caller's own.
    Elsewhere(Named),
    /// The result of the call is the program break.
    LearnBreak,
    /// A child that the call makes has an address space of its own.
    Copy,
    /// A child that the call makes may have an address space of its own: the flags cannot be read.
    MayCopy,
}

/// What decoding must know about the caller's address space.
pub(super) struct Context<'a> {
    pub(super) brk: &'a mut Break,
    /// Whether no other task shares the address space.
    pub(super) alone: bool,
    /// Returns the traced tasks.
    pub(super) tasks: &'a dyn Fn() -> Vec<Pid>,
    /// Adds the memory that a `fork` write-protects.
    pub(super) copied: &'a mut dyn FnMut(&mut Vec<VaRange>),
}

impl Entry {
    /// Adds the ranges that the call is about to invalidate, as far as its arguments and `/proc`
    /// tell, and returns the plan for the call. Returns `None` if the call invalidates nothing and
    /// the tracer needs nothing else of it.
    ///
    /// The ranges are rounded up when in doubt. This function does not check whether the kernel
    /// will accept the call: it reports a range whenever the arguments can form one.
    pub(super) fn plan(&self, context: Context<'_>, ranges: &mut Vec<VaRange>) -> Option<Plan> {
        let [a0, a1, a2, a3, a4, a5] = self.args;
        let mut cause = self.call.name();
        let mut then = Then::Close;
        let event = match self.call {
            Call::Munmap => {
                add(ranges, a0, a1);
                Event::Unmap
            }
            Call::Mmap => {
                mmap(ranges, a0, a1, a3, || self.huge_page(a0, a4));
                Event::Unmap
            }
            Call::OldMmap => {
                match self.word_list(a0, 5).as_deref() {
                    Ok([address, length, _, flags, file]) => {
                        mmap(ranges, *address, *length, *flags, || {
                            self.huge_page(*address, *file)
                        });
                    }
                    Ok(_) => {}
                    Err(_) => ranges.push(VaRange::ALL),
                }
                Event::Unmap
            }
            Call::RemapFilePages => {
                add(ranges, page::down(a0), a1);
                Event::Unmap
            }
            Call::Mremap => {
                mremap(ranges, a0, a1, a2, a3, a4, || self.huge_mapping(a0));
                Event::Unmap
            }
            // A query of the break.
            Call::Brk if a0 == 0 => Event::Unmap,
            Call::Brk => {
                let call = context
                    .brk
                    .begin(a0, context.alone, || maps::heap_end(self.maps()));
                let is_allowed =
                    |_: &u64| proc::lowest_break(self.tid).is_none_or(|lowest| a0 >= lowest);
                if let Some(end) = call.shrinks_from.filter(is_allowed) {
                    ranges.extend(VaRange::new(Va::new(page::up(a0)), Va::new(page::up(end))));
                }
                if call.learn {
                    then = Then::LearnBreak;
                }
                Event::Unmap
            }
            Call::Shmat => {
                self.shmat(ranges, a0, a1, a2);
                Event::Unmap
            }
            Call::Shmdt => {
                maps::attached_at(self.maps(), page::untagged(a0), ranges);
                Event::Unmap
            }
            Call::Ipc => {
                match a0 & 0xffff {
                    IPC_SHMAT => {
                        cause = "shmat";
                        self.shmat(ranges, a1, a4, a2);
                    }
                    IPC_SHMDT => {
                        cause = "shmdt";
                        maps::attached_at(self.maps(), page::untagged(a4), ranges);
                    }
                    _ => {}
                }
                Event::Unmap
            }
            Call::Madvise => {
                madvise(ranges, a0, a1, a2);
                Event::Clear
            }
            Call::ProcessMadvise => {
                if is_harmful(a3) {
                    then = Then::Elsewhere(proc::pidfd_target(self.tid, a0 as i32));
                    self.vectors(ranges, a1, a2, a3);
                }
                Event::Clear
            }
            Call::ProcessMrelease => {
                // This call frees the memory of a process that has been killed and has not ended
                // yet.
                then = Then::Elsewhere(proc::pidfd_target(self.tid, a0 as i32));
                ranges.push(VaRange::ALL);
                Event::Unmap
            }
            Call::Mprotect | Call::PkeyMprotect => {
                self.mprotect(ranges, a0, a1, a2);
                Event::ProtectionVma
            }
            Call::Mbind => {
                mbind(ranges, a0, a1, a5);
                Event::Migrate { owner: None }
            }
            Call::MovePages => {
                // Without a list of nodes the call is a query.
                if a3 != 0 {
                    then = self.elsewhere(a0, &context);
                    self.pages(ranges, a1, a2);
                }
                Event::Migrate { owner: None }
            }
            Call::MigratePages => {
                then = self.elsewhere(a0, &context);
                ranges.push(VaRange::ALL);
                Event::Migrate { owner: None }
            }
            Call::Fork | Call::Clone | Call::Clone3 => {
                let flags = match self.call {
                    Call::Clone => Ok(Some(a0)),
                    Call::Clone3 => self.read_u64(a0),
                    _ => Ok(Some(0)),
                };
                then = match flags {
                    Ok(Some(flags)) if flags & libc::CLONE_VM as u64 == 0 => Then::Copy,
                    // The child shares the memory, or the call will fail because its flags are not
                    // mapped.
                    Ok(_) => return None,
                    Err(_) => Then::MayCopy,
                };
                (context.copied)(ranges);
                Event::ProtectionPage
            }
        };
        let needless =
            ranges.is_empty() && !matches!(then, Then::LearnBreak | Then::Copy | Then::MayCopy);
        (!needless).then_some(Plan { cause, event, then })
    }

    /// Reads the mappings of the caller. If that fails, the callers assume that everything is
    /// mapped: a missed change is worse than a reported range that does not change.
    fn maps(&self) -> io::Result<Vec<maps::Mapping>> {
        maps::read(self.tid)
    }

    /// Returns the page size of a file that is about to be mapped at `address`, if it may be on
    /// hugetlbfs.
    fn huge_page(&self, address: u64, fd: u64) -> Option<u64> {
        huge_page::of(self.tid, fd as i32).unwrap_or(Some(largest_page_at(address)))
    }

    /// Returns an upper bound of the page size of the mapping at `address`, if the mapping may be
    /// on hugetlbfs.
    fn huge_mapping(&self, address: u64) -> Option<u64> {
        maps::has_file(self.maps(), page::untagged(address)).then(|| largest_page_at(address))
    }

    fn shmat(&self, ranges: &mut Vec<VaRange>, id: u64, address: u64, flags: u64) {
        if address == 0 || flags & libc::SHM_REMAP as u64 == 0 {
            return;
        }
        // `COMPAT_SHMLBA`, arch/arm64/include/asm/shmparam.h: four pages, for a 32-bit program.
        let is_rounded = cfg!(target_arch = "aarch64")
            && self.abi == Abi::Compat
            && flags & libc::SHM_RND as u64 != 0;
        let unit = if is_rounded { 4 } else { 1 } * page::size();
        let address = address & !(unit - 1);
        match proc::segment_size(self.tid, id as i32) {
            Some(size) => shmat(ranges, address, size),
            // The size of the segment is unknown, so any mapping above the address may be replaced.
            None => {
                let top = match self.maps() {
                    Ok(maps) => maps.last().map_or(0, |mapping| mapping.end),
                    Err(_) => page::down(u64::MAX),
                };
                add(ranges, address, top.saturating_sub(address));
            }
        }
    }

    fn mprotect(&self, ranges: &mut Vec<VaRange>, address: u64, length: u64, protection: u64) {
        let address = page::untagged(address);
        let mut start = address;
        if protection & PROT_GROWSDOWN != 0 {
            start = self.maps().map_or(0, |maps| {
                maps::holding(&maps, address).map_or(address, |mapping| mapping.start)
            });
        }
        // A length of zero changes nothing. The kernel refuses a length that wraps around.
        if length != 0 {
            if let Some(length) = length.checked_add(address - start) {
                add(ranges, start, length);
            }
        }
    }

    /// Adds the iovecs of `process_madvise`, or all addresses if they cannot be read.
    fn vectors(&self, ranges: &mut Vec<VaRange>, address: u64, count: u64, advice: u64) {
        // The kernel refuses more vectors.
        let count = 2 * count.min(UIO_MAXIOV);
        let Ok(words) = self.word_list(address, count) else {
            return ranges.push(VaRange::ALL);
        };
        for vector in words.chunks_exact(2) {
            madvise(ranges, vector[0], vector[1], advice);
        }
    }

    /// Adds the pages of `move_pages`, each with the folio that may contain the page. Adds all
    /// addresses if the list is very long or cannot be read.
    fn pages(&self, ranges: &mut Vec<VaRange>, count: u64, address: u64) {
        const MANY: u64 = 1 << 16;
        let mut pages = if count <= MANY {
            self.word_list(address, count).unwrap_or_default()
        } else {
            Vec::new()
        };
        if (pages.len() as u64) < count {
            return ranges.push(VaRange::ALL);
        }
        pages.sort_unstable();
        for near in pages.chunk_by(|a, b| b - a <= page::huge()) {
            folios(ranges, near[0], near[near.len() - 1] - near[0] + 1);
        }
    }

    /// For a call that names a process: decides on whose address space the call acts.
    fn elsewhere(&self, pid: u64, context: &Context<'_>) -> Then {
        let number = pid as Pid;
        if number == 0 {
            return Then::Close;
        }
        Then::Elsewhere(proc::named_by(
            self.tid,
            number,
            (context.tasks)().into_iter(),
        ))
    }

    /// Reads words of the ABI's width, up to the first one that is not mapped.
    ///
    /// # Errors
    /// If the memory may not be read.
    fn word_list(&self, address: u64, count: u64) -> io::Result<Vec<u64>> {
        let size = if self.abi.is_compat() { 4 } else { 8 };
        let mut bytes = vec![0; count as usize * size];
        let read = sys::read_memory(self.tid, address, &mut bytes)?;
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word[..size].copy_from_slice(bytes);
            u64::from_le_bytes(word)
        };
        Ok(bytes[..read].chunks_exact(size).map(word).collect())
    }

    /// Reads 64 bits, in any ABI. Returns `None` if a part of the eight bytes is not mapped.
    fn read_u64(&self, address: u64) -> io::Result<Option<u64>> {
        let mut bytes = [0; 8];
        Ok((sys::read_memory(self.tid, address, &mut bytes)? == 8)
            .then(|| u64::from_le_bytes(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::copied::LastMaps;
    use super::*;

    fn ranges_of(call: Call, args: [u64; 6]) -> (Option<Plan>, Vec<(u64, u64)>) {
        let entry = Entry {
            tid: std::process::id() as Pid,
            abi: Abi::Native,
            call,
            args,
        };
        let (mut ranges, mut brk) = (Vec::new(), Break::default());
        let plan = entry.plan(
            Context {
                brk: &mut brk,
                alone: true,
                tasks: &Vec::new,
                copied: &mut |ranges| LastMaps::default().writable(entry.tid, 1, ranges),
            },
            &mut ranges,
        );
        (
            plan,
            ranges
                .iter()
                .map(|range| (range.start().get(), range.end().map_or(0, Va::get)))
                .collect(),
        )
    }

    fn mremap(old_length: u64, new_length: u64, flags: i32) -> Vec<(u64, u64)> {
        ranges_of(
            Call::Mremap,
            [0x10000, old_length, new_length, flags as u64, 0x80000, 0],
        )
        .1
    }

    #[test]
    fn a_munmap_of_part_of_a_page_is_of_the_whole_page() {
        assert_eq!(
            ranges_of(Call::Munmap, [0x1000, 1, 0, 0, 0, 0]).1,
            [(0x1000, 0x2000)]
        );
        assert_eq!(
            ranges_of(Call::Munmap, [0x1001, 0x1000, 0, 0, 0, 0]).1,
            [(0x1000, 0x3000)],
            "refused by the kernel"
        );
        assert_eq!(
            ranges_of(Call::Munmap, [0x1000, 0, 0, 0, 0, 0]),
            (None, vec![])
        );
        assert_eq!(
            ranges_of(Call::Munmap, [u64::MAX, u64::MAX, 0, 0, 0, 0]),
            (None, vec![])
        );
    }

    #[test]
    fn mremap_invalidates_the_tail_or_all_or_nothing() {
        assert_eq!(mremap(0x3000, 0x1000, 0), [(0x11000, 0x13000)]);
        assert_eq!(
            mremap(0x3000, 0x1000, libc::MREMAP_MAYMOVE),
            [(0x11000, 0x13000)]
        );
        assert_eq!(mremap(0x1000, 0x3000, 0), [], "it grows in place or fails");
        assert_eq!(
            mremap(0x1000, 0x3000, libc::MREMAP_MAYMOVE),
            [(0x10000, 0x11000)]
        );
        assert_eq!(mremap(0x1000, 0x1000, libc::MREMAP_MAYMOVE), []);
        assert_eq!(
            mremap(0xfff, 0x1000, libc::MREMAP_MAYMOVE),
            [],
            "the same number of pages"
        );
        assert_eq!(
            mremap(
                0x1000,
                0x1000,
                libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP
            ),
            [(0x10000, 0x11000)]
        );
    }

    #[test]
    fn mremap_to_a_fixed_address_also_invalidates_the_destination() {
        let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        assert_eq!(
            mremap(0x1000, 0x2000, fixed),
            [(0x10000, 0x11000), (0x80000, 0x82000)]
        );
        assert_eq!(
            mremap(0, 0x2000, fixed),
            [(0x80000, 0x82000)],
            "an old length of zero leaves the old range"
        );
        assert_eq!(
            mremap(u64::MAX, u64::MAX, fixed),
            [],
            "nothing can be formed, nothing panics"
        );
    }

    #[test]
    fn queries_and_policies_invalidate_nothing() {
        assert_eq!(ranges_of(Call::MovePages, [0, 1, 0x1000, 0, 0, 0]).0, None);
        assert_eq!(ranges_of(Call::Mbind, [0x1000, 0x1000, 0, 0, 0, 1]).0, None);
        assert_eq!(
            ranges_of(Call::Madvise, [0x1000, 0x1000, 3, 0, 0, 0]).0,
            None
        );
        assert_eq!(
            ranges_of(Call::Clone, [libc::CLONE_VM as u64, 0, 0, 0, 0, 0]).0,
            None
        );
    }

    #[test]
    fn moved_pages_are_reported_with_their_folios_and_merged() {
        const MIB: u64 = 1 << 20;
        let pages: [u64; 5] = [9 * MIB, 3 * MIB, 3 * MIB + 4096, 5 * MIB, 30 * MIB];
        let (plan, ranges) = ranges_of(
            Call::MovePages,
            [0, 5, pages.as_ptr().addr() as u64, 0x1000, 0, 0],
        );
        assert_eq!(
            plan.map(|plan| plan.event),
            Some(Event::Migrate { owner: None })
        );
        assert_eq!(
            ranges,
            [
                (2 * MIB, 6 * MIB),
                (8 * MIB, 10 * MIB),
                (30 * MIB, 32 * MIB)
            ]
        );
    }

    #[test]
    fn if_the_mappings_cannot_be_read_everything_is_reported() {
        let ranges_of = |call, args| {
            let entry = Entry {
                tid: Pid::MAX,
                abi: Abi::Native,
                call,
                args,
            };
            let (mut ranges, mut brk) = (Vec::new(), Break::default());
            entry.plan(
                Context {
                    brk: &mut brk,
                    alone: true,
                    tasks: &Vec::new,
                    copied: &mut |ranges| LastMaps::default().writable(entry.tid, 1, ranges),
                },
                &mut ranges,
            );
            ranges
        };
        let all = vec![VaRange::ALL];
        assert_eq!(ranges_of(Call::Shmdt, [0x1000, 0, 0, 0, 0, 0]), all);
        assert_eq!(ranges_of(Call::Fork, [0; 6]), all);
        assert_eq!(
            ranges_of(Call::MovePages, [0, 1, 0x1000, 0x1000, 0, 0]),
            all
        );
        let from = |start: u64| {
            VaRange::new(Va::new(start), Va::new(page::down(u64::MAX))).expect("a range")
        };
        assert_eq!(
            ranges_of(Call::Brk, [0x5000, 0, 0, 0, 0, 0]),
            [from(0x5000)]
        );
        assert_eq!(
            ranges_of(
                Call::Shmat,
                [u64::MAX, 0x3000, libc::SHM_REMAP as u64, 0, 0, 0]
            ),
            [from(0x3000)]
        );
        assert_eq!(ranges_of(Call::OldMmap, [0x1000, 0, 0, 0, 0, 0]), all);
        assert_eq!(
            ranges_of(Call::ProcessMadvise, [3, 0x1000, 1, 21, 0, 0]),
            all
        );
        let file = ranges_of(
            Call::Mmap,
            [0x4020_0000, 0x1000, 0, libc::MAP_FIXED as u64, 3, 0],
        );
        assert_eq!(
            file,
            [VaRange::new(Va::new(0x4020_0000), Va::new(0x4040_0000)).expect("a range")]
        );
        let down = ranges_of(Call::Mprotect, [0x7000, 0x1000, PROT_GROWSDOWN, 0, 0, 0]);
        assert_eq!(
            down,
            [VaRange::new(Va::new(0), Va::new(0x8000)).expect("a range")]
        );
    }

    #[test]
    fn an_unreadable_target_or_argument_counts_as_unknown() {
        let then_of = |call, args| {
            let entry = Entry {
                tid: Pid::MAX,
                abi: Abi::Native,
                call,
                args,
            };
            let plan = entry.plan(
                Context {
                    brk: &mut Break::default(),
                    alone: true,
                    tasks: &Vec::new,
                    copied: &mut |ranges| LastMaps::default().writable(entry.tid, 1, ranges),
                },
                &mut Vec::new(),
            );
            plan.map(|plan| plan.then)
        };
        let anyone = Some(Then::Elsewhere(Named::Anyone));
        assert_eq!(
            then_of(Call::ProcessMadvise, [3, 0x1000, 1, 21, 0, 0]),
            anyone
        );
        assert_eq!(then_of(Call::ProcessMrelease, [3, 0, 0, 0, 0, 0]), anyone);
        assert_eq!(
            then_of(Call::MovePages, [7, 1, 0x1000, 0x1000, 0, 0]),
            anyone
        );
        assert_eq!(
            then_of(Call::MigratePages, [7, 1, 0x1000, 0x1000, 0, 0]),
            anyone
        );
        assert_eq!(
            then_of(Call::Clone3, [0x1000, 88, 0, 0, 0, 0]),
            Some(Then::MayCopy)
        );
    }

    #[test]
    fn memory_that_is_released_is_all_of_the_other_process() {
        let (plan, ranges) = ranges_of(Call::ProcessMrelease, [-10001_i64 as u64, 0, 0, 0, 0, 0]);
        let then = Then::Elsewhere(Named::Task(std::process::id() as Pid));
        assert_eq!(
            plan,
            Some(Plan {
                cause: "process_mrelease",
                event: Event::Unmap,
                then
            })
        );
        assert_eq!(ranges, [(0, 0)]);
        let refused = ranges_of(Call::ProcessMrelease, [u64::MAX, 0, 0, 0, 0, 0]).0;
        assert_eq!(
            refused.map(|plan| plan.then),
            Some(Then::Elsewhere(Named::Stranger))
        );
    }

    #[test]
    fn a_copying_clone_protects_writable_memory() {
        let (plan, ranges) = ranges_of(Call::Clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]);
        let plan = plan.expect("a fork is planned");
        assert_eq!(
            (plan.cause, plan.event, plan.then),
            ("clone", Event::ProtectionPage, Then::Copy)
        );
        assert!(!ranges.is_empty());
    }
}
