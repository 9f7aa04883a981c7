//! `/proc/PID/maps`.

mod line;

use std::fs::File;
use std::io::{self, Read};

use mmu_notifier::{Va, VaRange};

use crate::page;

pub(crate) use self::line::{Kind, Mapping, parse};

/// Reads the mappings of a task, in order of address. The list is empty for a task that has died
/// and has not been reaped.
///
/// # Errors
/// If the file cannot be read. The caller must then assume that everything is mapped.
pub(crate) fn read(tid: libc::pid_t) -> io::Result<Vec<Mapping>> {
    // The kernel does not report the file's size. The capacity saves `read_to_end` from small
    // reads.
    let mut text = Vec::with_capacity(1 << 16);
    File::open(crate::procfs::of(tid, "maps")?)?.read_to_end(&mut text)?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect())
}

/// Collects the mappings that `shmdt(address)` detaches: the pieces of one segment that still lie
/// where attaching the segment at `address` put them. If the mappings could not be read, this is
/// all memory.
///
/// # Source
/// `ksys_shmdt`, ipc/shm.c. A piece is detached if it belongs to the same segment and its offset
/// equals its distance from `address`. The lowest such piece determines the segment.
pub(crate) fn attached_at(maps: io::Result<Vec<Mapping>>, address: u64, into: &mut Vec<VaRange>) {
    let Ok(maps) = maps else {
        return into.push(VaRange::ALL);
    };
    let mut segment = None;
    for mapping in maps
        .iter()
        .filter(|mapping| mapping.is_attached(address, &mut segment))
    {
        push(into, mapping.start, mapping.end);
    }
}

impl Mapping {
    /// Tells whether `shmdt(address)` detaches this mapping. The caller goes through all mappings
    /// in order of address and keeps `segment`, at first `None`, between the calls.
    pub(crate) fn is_attached(
        &self,
        address: u64,
        segment: &mut Option<((u32, u32), u64)>,
    ) -> bool {
        let this = (self.device, self.inode);
        self.kind == Kind::SysV
            && self.start >= address
            && self.start - address == self.offset
            && *segment.get_or_insert(this) == this
    }
}

/// Returns the mapping that contains `address`.
pub(crate) fn holding(maps: &[Mapping], address: u64) -> Option<&Mapping> {
    maps.iter()
        .find(|mapping| mapping.start <= address && address < mapping.end)
}

/// Tells whether the mapping that contains `address` may be of a file, as every mapping of
/// hugetlbfs is. Returns true if the mappings could not be read.
pub(crate) fn has_file(maps: io::Result<Vec<Mapping>>, address: u64) -> bool {
    maps.map_or(true, |maps| {
        holding(&maps, address).is_some_and(|mapping| mapping.inode != 0)
    })
}

/// Returns the end of the heap, or `None` if there is no heap. A mapping that the kernel has merged
/// with the heap counts as heap. If the mappings could not be read, returns the highest address of
/// a page.
pub(crate) fn heap_end(maps: io::Result<Vec<Mapping>>) -> Option<u64> {
    let Ok(maps) = maps else {
        return Some(page::down(u64::MAX));
    };
    maps.iter()
        .rfind(|mapping| mapping.kind == Kind::Heap)
        .map(|mapping| mapping.end)
}

fn push(into: &mut Vec<VaRange>, start: u64, end: u64) {
    into.extend(VaRange::new(Va::new(start), Va::new(end)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(text: &str) -> Vec<Mapping> {
        text.lines()
            .filter_map(|line| parse(line.as_bytes()))
            .collect()
    }

    fn range(start: u64, end: u64) -> VaRange {
        VaRange::new(Va::new(start), Va::new(end)).expect("a range")
    }

    #[test]
    fn what_the_kernel_has_merged_with_the_heap_is_heap() {
        let maps = maps(
            "1000-2000 rw-p 00000000 00:00 0   [heap]\n7000-8000 rwxp 00000000 00:00 0   [heap]\n9000-a000 rw-p 00000000 00:00 0 \n",
        );
        assert_eq!(heap_end(Ok(maps)), Some(0x8000));
    }

    #[test]
    fn a_segment_with_a_hole_is_detached_in_pieces_and_a_second_attachment_stays() {
        let maps = maps(
            "1000-2000 rw-s 00000000 00:01 9   /SYSV00000000 (deleted)\n3000-4000 rw-s 00002000 00:01 9   /SYSV00000000\n\
             4000-5000 rw-s 00000000 00:01 9   /SYSV00000000 (deleted)\n5000-6000 rw-s 00004000 00:01 8   /SYSV00000000\n",
        );
        let mut found = Vec::new();
        attached_at(Ok(maps), 0x1000, &mut found);
        assert_eq!(found, [range(0x1000, 0x2000), range(0x3000, 0x4000)]);
    }

    #[test]
    fn a_path_that_is_not_text_and_a_broken_line_do_no_harm() {
        let line = b"1000-2000 rw-p 00000000 00:00 5                          /\xff\xfe";
        assert_eq!(parse(line).map(|mapping| mapping.kind), Some(Kind::Other));
        assert_eq!(parse(b"1000"), None);
        assert_eq!(parse(b""), None);
    }
}
