//! Files to map.

use std::fs::File;
use std::io::{self, Write};

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};

use super::region::page_size;

/// A file in memory.
pub(crate) fn memory_file(pages: usize) -> io::Result<File> {
    let file = File::from(memfd_create("coverage", MemfdFlags::CLOEXEC)?);
    file.set_len((pages * page_size()) as u64)?;
    Ok(file)
}

/// A file on a disk, clean, without a name.
///
/// # Errors
/// The folders for scratch files are all in memory, where a file has no writeback; or the error of
/// the kernel.
pub(crate) fn scratch_file(pages: usize) -> io::Result<File> {
    let folders = [std::env::temp_dir(), "/var/tmp".into(), ".".into()];
    let on_disk = |folder: &std::path::PathBuf| {
        const TMPFS: i64 = 0x0102_1994;
        rustix::fs::statfs(folder).is_ok_and(|fs| fs.f_type != TMPFS)
    };
    let Some(folder) = folders.iter().find(|folder| on_disk(folder)) else {
        return Err(io::Error::other("no folder for scratch files is on a disk"));
    };
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(&vec![1; pages * page_size()])?;
    file.sync_all()?;
    Ok(file)
}
