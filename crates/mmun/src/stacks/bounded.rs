//! Opens files without side effects, and reads them within limits. The traced program chose these
//! files.
//!
//! Such a file can be a named pipe whose open blocks for ever, a device whose open has an effect, a
//! link to another file, or a sparse file of a terabyte.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Seek};
use std::ops::Range;
use std::path::Path;

use object::read::{ReadCache, ReadRef};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, open, openat};

/// Whether the last part of a path may be a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Links {
    Follow,
    Refuse,
}

/// Opens a regular file for reading; `None` for anything else.
///
/// The kind of the file is checked with an `O_PATH` descriptor. Then that descriptor is opened
/// instead of the path, because the path may name another file by then.
///
/// # Blocking
/// Does not wait for the writer of a pipe or for the owner of a lease. May wait for a file system.
pub(super) fn regular(path: &Path, links: Links) -> Option<File> {
    let follow = if links == Links::Refuse {
        OFlags::NOFOLLOW
    } else {
        OFlags::empty()
    };
    let unopened = open(path, OFlags::PATH | OFlags::CLOEXEC | follow, Mode::empty()).ok()?;
    if FileType::from_raw_mode(fstat(&unopened).ok()?.st_mode) != FileType::RegularFile {
        return None;
    }
    let again = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&unopened)
    );
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    openat(CWD, again, flags, Mode::empty())
        .ok()
        .map(File::from)
}

/// The input of an ELF file.
pub(super) trait Reader: Read + Seek {}
impl<T: Read + Seek> Reader for T {}

/// The input for `object`: reads each part once, and caches it.
pub(super) struct Source {
    cache: ReadCache<Box<dyn Reader>>,
    /// How many bytes may still be read.
    left: Cell<u64>,
}

/// The limit of one read and of all reads together. The largest tables of the largest programs are
/// smaller.
const MOST_AT_ONCE: u64 = 512 << 20;
const MAX_BYTES: u64 = 1 << 30;

impl Source {
    pub(super) fn new(reader: Box<dyn Reader>) -> Source {
        Source {
            cache: ReadCache::new(reader),
            left: Cell::new(MAX_BYTES),
        }
    }

    /// Parses the ELF file; `None` if it is malformed.
    pub(super) fn elf(&self) -> Option<object::File<'_, Bounded<'_>>> {
        object::File::parse(Bounded(self)).ok()
    }
}

/// Refuses reads beyond the limits.
#[derive(Clone, Copy)]
pub(super) struct Bounded<'a>(&'a Source);

impl<'a> ReadRef<'a> for Bounded<'a> {
    fn len(self) -> Result<u64, ()> {
        self.0.cache.len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        let left = self.0.left.get().checked_sub(size).ok_or(())?;
        if size > MOST_AT_ONCE {
            return Err(());
        }
        self.0.left.set(left);
        self.0.cache.read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        // The cache limits the length of a string, but there can be many strings.
        let text = self.0.cache.read_bytes_at_until(range, delimiter)?;
        let left = self.0.left.get().checked_sub(text.len() as u64 + 1);
        self.0.left.set(left.ok_or(())?);
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn strings_are_charged_as_well() {
        let source = Source::new(Box::new(std::io::Cursor::new(b"abc\0abc\0abc\0".to_vec())));
        source.left.set(9);
        let text = |at| Bounded(&source).read_bytes_at_until(at..12, 0);
        assert_eq!((text(0), text(4)), (Ok(&b"abc"[..]), Ok(&b"abc"[..])));
        assert_eq!(text(8), Err(()));
    }

    #[test]
    fn only_a_regular_file_is_opened() {
        let folder = std::env::temp_dir().join(format!("mmun-regular-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let [file, pipe, link, socket] =
            ["file", "pipe", "link", "socket"].map(|name| folder.join(name));
        fs::write(&file, "text").unwrap();
        rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        symlink(&file, &link).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let opens = |path: &Path, links| regular(path, links).is_some();
        // If the pipe were opened, this would block for ever.
        let found = [&file, &link, &pipe, &socket, &folder].map(|path| opens(path, Links::Follow));
        assert_eq!(found, [true, true, false, false, false]);
        let found = [&file, &link, &pipe].map(|path| opens(path, Links::Refuse));
        assert_eq!(found, [true, false, false]);
        assert!(
            !opens(Path::new("/dev/zero"), Links::Follow)
                && !opens(&folder.join("none"), Links::Follow)
        );
        let mut text = String::new();
        regular(&file, Links::Refuse)
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "text");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_sparse_file_fills_no_memory() {
        let path = std::env::temp_dir().join(format!("mmun-sparse-{}", std::process::id()));
        let file = File::create_new(&path).unwrap();
        file.set_len(1 << 40).unwrap();
        let source = Source::new(Box::new(File::open(&path).unwrap()));
        fs::remove_file(&path).unwrap();
        let bounded = Bounded(&source);
        assert_eq!(bounded.len(), Ok(1 << 40));
        assert!(bounded.read_bytes_at(0, MOST_AT_ONCE + 1).is_err());
        assert!(
            bounded
                .read_bytes_at(1 << 39, 4096)
                .is_ok_and(|bytes| bytes.len() == 4096)
        );
        source.left.set(4095);
        assert!(
            bounded.read_bytes_at(0, 4096).is_err(),
            "the sum is bounded, too"
        );
        assert!(source.elf().is_none());
    }
}
