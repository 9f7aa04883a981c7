//! Code that a program has generated, from the map that the program writes (`/tmp/perf-PID.map`).

use std::collections::HashMap;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use mmu_source::process::Pid;

use super::bounded::{Links, regular};

/// The maps of all processes, each read once.
#[derive(Debug, Default)]
pub(super) struct PerfMaps(HashMap<Pid, PerfMap>);

/// The functions of one process.
#[derive(Debug, Default)]
pub(super) struct PerfMap {
    text: Vec<u8>,
    /// The address, size and name of each function, in order of address.
    symbols: Vec<(u64, u64, Range<usize>)>,
}

/// The maximum that is read of a map.
const MAX_BYTES: u64 = 64 << 20;

impl PerfMaps {
    /// The map of a process of `user`; an empty one if there is no map or it is not trusted.
    pub(super) fn of(&mut self, pid: Pid, user: Option<u32>) -> &PerfMap {
        let read = || {
            let mut text = Vec::new();
            // Every user may write to `/tmp`: a pipe would block for ever, a link may lead to any
            // file, and another user's map may have wrong names.
            let file = regular(Path::new(&format!("/tmp/perf-{pid}.map")), Links::Refuse);
            let file = file.filter(|file| {
                let owner = file.metadata().map(|about| about.uid());
                owner.is_ok_and(|owner| is_trusted(owner, user))
            });
            if file.is_some_and(|file| file.take(MAX_BYTES).read_to_end(&mut text).is_err()) {
                text.clear();
            }
            PerfMap::new(text)
        };
        self.0.entry(pid).or_insert_with(read)
    }
}

/// A map is trusted if root or the user of the process owns it. If that user is not known, the user
/// of this program counts instead, as for `perf`.
fn is_trusted(owner: u32, user: Option<u32>) -> bool {
    let user = user.unwrap_or_else(|| rustix::process::geteuid().as_raw());
    owner == 0 || owner == user
}

impl PerfMap {
    fn new(text: Vec<u8>) -> PerfMap {
        let begin = text.as_ptr().addr();
        let symbol = |line: &[u8]| {
            let (start, size, name) = symbol(line)?;
            let at = name.as_ptr().addr() - begin;
            Some((start, size, at..at + name.len()))
        };
        let mut symbols: Vec<_> = text
            .split(|byte| *byte == b'\n')
            .filter_map(symbol)
            .collect();
        // A later line replaces an earlier one at the same address.
        symbols.sort_by_key(|(start, ..)| *start);
        PerfMap { text, symbols }
    }

    /// The function that holds `address`.
    pub(super) fn name(&self, address: u64) -> Option<String> {
        let end = self
            .symbols
            .partition_point(|(start, ..)| *start <= address);
        // A compiler may have replaced code at these addresses, so check several symbols.
        let mut near = self.symbols[..end].iter().rev().take(8);
        let (.., name) = near.find(|(start, size, _)| address - start < (*size).max(1))?;
        Some(String::from_utf8_lossy(&self.text[name.clone()]).into_owned())
    }
}

/// `START SIZE name`, in hexadecimal.
fn symbol(line: &[u8]) -> Option<(u64, u64, &[u8])> {
    let mut words = line.splitn(3, |byte| *byte == b' ');
    let mut hex = || {
        u64::from_str_radix(
            std::str::from_utf8(words.next()?)
                .ok()?
                .trim_start_matches("0x"),
            16,
        )
        .ok()
    };
    let (start, size) = (hex()?, hex()?);
    Some((start, size, words.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_perf_map_may_have_spaces_in_its_name() {
        let name = b"LazyCompile:~f /a b.js:1";
        assert_eq!(
            symbol(b"7f10 20 LazyCompile:~f /a b.js:1"),
            Some((0x7f10, 0x20, &name[..]))
        );
        assert_eq!(
            (symbol(b""), symbol(b"zz 1 a"), symbol(b"1 2")),
            (None, None, None)
        );
    }

    #[test]
    fn a_map_is_the_users_own() {
        // A pid that no process has, so that the file belongs to this test only.
        let pid = i32::MAX - std::process::id() as i32;
        let path = format!("/tmp/perf-{pid}.map");
        std::fs::write(&path, "10 10 f\n").unwrap();
        let mut owner = rustix::process::geteuid().as_raw();
        if owner == 0 {
            owner = 65534;
            if std::os::unix::fs::chown(&path, Some(owner), None).is_err() {
                std::fs::remove_file(&path).unwrap();
                println!("SKIP: this user namespace has no second user");
                return;
            }
        }
        let name = |user| PerfMaps::default().of(pid, Some(user)).name(0x10);
        let names = [name(owner), name(owner + 1)];
        std::fs::remove_file(&path).unwrap();
        assert_eq!(names, [Some("f".to_owned()), None]);
        assert!(is_trusted(0, Some(owner)) && is_trusted(0, None));
    }

    #[test]
    fn the_latest_symbol_at_an_address_counts() {
        let map = PerfMap::new(b"10 10 old\nnonsense\n30 8 other\n10 10 new\n".into());
        let names = [0xf, 0x10, 0x1f, 0x20, 0x37].map(|at| map.name(at).unwrap_or_default());
        assert_eq!(names, ["", "new", "new", "", "other"]);
    }
}
