//! The memory that `fork` write-protects.

use std::fs::File;
use std::io;

use mmu_notifier::{Va, VaRange};

use super::{Pid, maps, sys};
use crate::procfs;

/// The open `maps` file of the address space that forked last. A program that forks in a loop finds
/// it open.
#[derive(Debug, Default)]
pub(super) struct LastMaps(Option<(u64, File)>);

impl LastMaps {
    /// Adds the memory that a `fork` write-protects: private writable mappings, with adjacent ones
    /// joined. The stopped task `tid` is about to fork the address space with the identifier `mm`.
    ///
    /// Private memory that is now read-only needs no range: its pages are write-protected already.
    /// If the mappings are not known, everything counts as writable.
    pub(super) fn writable(&mut self, tid: Pid, mm: u64, ranges: &mut Vec<VaRange>) {
        // Most mappings of a program are read-only. So asking for the writable ones is faster than
        // reading the text of all.
        match self.asked(tid, mm).or_else(|_| read(tid)) {
            Ok(writable) => join(&writable, ranges),
            Err(_) => ranges.push(VaRange::ALL),
        }
    }

    /// Asks for the mappings one by one.
    ///
    /// # Errors
    /// If the kernel is older than 6.11, the file cannot be opened, or the task has ended.
    fn asked(&mut self, tid: Pid, mm: u64) -> io::Result<Vec<(u64, u64)>> {
        // The file stays that of the address space which the task was in when it was opened. So it
        // serves no other one, whose task may have the same number.
        let maps = match self.0.take().filter(|(of, _)| *of == mm) {
            Some((_, maps)) => maps,
            None => File::open(procfs::of(tid, "maps")?)?,
        };
        let found = asked(&maps)?;
        self.0 = Some((mm, maps));
        Ok(found)
    }
}

fn asked(maps: &File) -> io::Result<Vec<(u64, u64)>> {
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(mapping) = sys::writable_at_or_after(maps, at)? {
        if mapping.private {
            found.push((mapping.start, mapping.end));
        }
        at = mapping.end;
    }
    Ok(found)
}

/// Reads all mappings as text.
///
/// # Errors
/// If the file cannot be read.
fn read(tid: Pid) -> io::Result<Vec<(u64, u64)>> {
    let all = maps::read(tid)?;
    let writable = all
        .iter()
        .filter(|mapping| mapping.private && mapping.writable);
    Ok(writable
        .map(|mapping| (mapping.start, mapping.end))
        .collect())
}

fn join(writable: &[(u64, u64)], into: &mut Vec<VaRange>) {
    for piece in writable.chunk_by(|before, next| before.1 == next.0) {
        let (start, end) = (piece[0].0, piece[piece.len() - 1].1);
        into.extend(VaRange::new(Va::new(start), Va::new(end)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined() {
        let mut found = Vec::new();
        join(
            &[(0x1000, 0x2000), (0x2000, 0x3000), (0x7000, 0x8000)],
            &mut found,
        );
        let range = |start, end| VaRange::new(Va::new(start), Va::new(end)).expect("a range");
        assert_eq!(found, [range(0x1000, 0x3000), range(0x7000, 0x8000)]);
    }

    #[test]
    fn a_task_that_cannot_be_read_may_have_everything_writable() {
        let mut found = Vec::new();
        LastMaps::default().writable(Pid::MAX, 1, &mut found);
        assert_eq!(found, [VaRange::ALL]);
    }
    #[test]
    fn the_file_of_another_address_space_is_not_used() {
        let (own, mut last) = (std::process::id() as Pid, LastMaps::default());
        let mut of = |tid, mm| {
            let mut found = Vec::new();
            last.writable(tid, mm, &mut found);
            found
        };
        let (all, first) = (vec![VaRange::ALL], of(own, 1));
        assert_ne!(first, all, "a process can read its own");
        if of(Pid::MAX, 1) != all {
            assert_eq!(of(Pid::MAX, 2), all);
        }
    }
}
