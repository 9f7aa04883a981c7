//! The files that programs have mapped, kept so that they can be read after the programs have ended
//! and the files were deleted.
//!
//! # Safety
//! A mapping keeps the file, but this module never reads the mapping directly: another process can
//! truncate the file, and an access beyond its end kills the reader. All reads go through
//! `/proc/self/mem`, which returns an error instead.
#![expect(unsafe_code, reason = "maps files to keep them")]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use mmu_source::process::{Current, Pid};
use object::read::{Object, ObjectSection, ObjectSegment};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::param::page_size;

use super::bounded::{Links, Reader, Source, regular};
use super::signed;
use crate::capture::ioctl::Vma;
use crate::who::shown;

/// All files so far.
#[derive(Debug, Default)]
pub(super) struct Images {
    pub(super) list: Vec<Image>,
    by_file: HashMap<((u32, u32), u64), u32>,
    budget: Budget,
}

/// A file, or memory without a file, that has code.
#[derive(Debug)]
pub(super) struct Image {
    /// The process's path of the file, or the kernel's name of the memory.
    pub(super) path: String,
    pub(super) content: Content,
    /// The segments that are executable.
    segments: Vec<Segment>,
    pub(super) sections: Sections,
    /// Whether its unwind tables are too large to be read.
    pub(super) is_partial: bool,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    offset: u64,
    size: u64,
    address: u64,
}

/// The sections for unwinding, copied.
#[derive(Clone, Debug, Default)]
pub(super) struct Sections {
    pub(super) text: Option<(u64, u64)>,
    pub(super) eh_frame: Option<(u64, Arc<[u8]>)>,
    pub(super) eh_frame_hdr: Option<(u64, Arc<[u8]>)>,
}

#[derive(Debug)]
pub(super) enum Content {
    /// A file that is mapped here.
    Mapped(Mapped),
    /// A copy of the vdso.
    Memory(Arc<[u8]>),
    /// Memory without a file, from `begin` on, with code that the process has generated.
    Anonymous {
        pid: Pid,
        begin: u64,
        /// The user of the process, if known.
        user: Option<u32>,
    },
}

/// The limits of one section and of the sections of all files together, because the traced programs
/// chose the files. The largest tables of the largest programs have 30 MiB.
const MAX_SECTION: u64 = 64 << 20;
const MAX_TOTAL: u64 = 512 << 20;
/// The limit of tables without an index, because each look-up would search them from their
/// beginning.
const MAX_UNINDEXED: u64 = 4 << 20;

/// How many more bytes of unwind tables may be copied.
#[derive(Debug)]
pub(super) struct Budget(u64);

impl Default for Budget {
    fn default() -> Budget {
        Budget(MAX_TOTAL)
    }
}

impl Budget {
    /// Subtracts `size` from the budget; `false` if it does not fit.
    fn take(&mut self, size: u64) -> bool {
        let left = self.0.checked_sub(size).filter(|_| size <= MAX_SECTION);
        self.0 = left.unwrap_or(self.0);
        left.is_some()
    }
}

impl Images {
    /// The image behind a mapping of the stopped task, and the process's address of the image's
    /// address 0; `None` if the mapping is neither of an ELF file's code nor the vdso.
    pub(super) fn of(&mut self, vma: &Vma, current: &Current) -> Option<(u32, u64)> {
        let key = (vma.device, vma.inode);
        let number = match self.by_file.get(&key).filter(|_| vma.inode != 0) {
            Some(number) => *number,
            None => {
                let content = if vma.inode == 0 {
                    from_memory(vma, current)?
                } else {
                    from_file(vma, current.task.pid)?
                };
                let image = Image::new(vma.name.clone(), content, &mut self.budget)?;
                let number = self.push(image);
                if vma.inode != 0 {
                    self.by_file.insert(key, number);
                }
                number
            }
        };
        Some((
            number,
            self.list[number as usize].bias(vma, page_size() as u64)?,
        ))
    }

    /// Adds an image for memory without a file.
    pub(super) fn anonymous(&mut self, name: &str, pid: Pid, begin: u64) -> u32 {
        let path = if name.is_empty() {
            "[anon]".to_owned()
        } else {
            name.to_owned()
        };
        let (segments, sections) = (Vec::new(), Sections::default());
        let user = shown(pid, ".").and_then(|name| fs::metadata(name).ok());
        let user = user.map(|about| about.uid());
        self.push(Image {
            path,
            content: Content::Anonymous { pid, begin, user },
            segments,
            sections,
            is_partial: false,
        })
    }

    fn push(&mut self, image: Image) -> u32 {
        self.list.push(image);
        self.list.len() as u32 - 1
    }
}

impl Image {
    /// `None` if it is not an ELF file.
    pub(super) fn new(path: String, content: Content, budget: &mut Budget) -> Option<Image> {
        let source = Source::new(content.reader()?);
        let elf = source.elf()?;
        let is_executable = |segment: &object::Segment<'_, '_, _>| match segment.flags() {
            object::SegmentFlags::Elf { p_flags, .. } => p_flags.0 & object::elf::PF_X.0 != 0,
            _ => false,
        };
        let segments = elf.segments().filter(is_executable).map(|segment| {
            let (offset, size) = segment.file_range();
            Segment {
                offset,
                size,
                address: segment.address(),
            }
        });
        let segments = segments.collect();
        let mut is_partial = false;
        let mut section = |name: &str, most: u64| {
            let section = elf.section_by_name(name)?;
            if section.size() > most || !budget.take(section.size()) {
                is_partial = true;
                return None;
            }
            Some((section.address(), Arc::from(section.data().ok()?)))
        };
        let eh_frame_hdr = section(".eh_frame_hdr", MAX_SECTION);
        let most = if eh_frame_hdr.is_some() {
            MAX_SECTION
        } else {
            MAX_UNINDEXED
        };
        let text = elf
            .section_by_name(".text")
            .map(|section| (section.address(), section.size()));
        let mut eh_frame = section(".eh_frame", most);
        if elf.architecture() == object::Architecture::Aarch64 {
            if let Some((_, bytes)) = &mut eh_frame {
                signed::replace(Arc::make_mut(bytes));
            }
        }
        let sections = Sections {
            text,
            eh_frame,
            eh_frame_hdr,
        };
        drop(elf);
        Some(Image {
            path,
            content,
            segments,
            sections,
            is_partial,
        })
    }

    /// The process's address of the image's address 0, if this mapping is of an executable segment.
    /// `page` is the kernel's page size: the loader maps whole pages.
    fn bias(&self, vma: &Vma, page: u64) -> Option<u64> {
        let mask = !(page - 1);
        if let Content::Memory(_) = self.content {
            return Some(vma.start);
        }
        let holds = |segment: &&Segment| {
            let end = segment
                .offset
                .saturating_add(segment.size)
                .saturating_add(page - 1)
                & mask;
            (segment.offset & mask..end).contains(&vma.offset)
        };
        let segment = self.segments.iter().find(holds)?;
        let inside = vma.offset - (segment.offset & mask);
        vma.start
            .checked_sub((segment.address & mask).checked_add(inside)?)
    }
}

/// A copy of the vdso; `None` for any other memory.
fn from_memory(vma: &Vma, current: &Current) -> Option<Content> {
    if vma.name != "[vdso]" {
        return None;
    }
    let mut bytes = vec![
        0;
        usize::try_from(vma.end - vma.start)
            .ok()
            .filter(|size| *size <= 1 << 20)?
    ];
    let read = current.read_memory(vma.start, &mut bytes);
    bytes.truncate(read);
    Some(Content::Memory(bytes.into()))
}

/// The mapped file itself, even if it was deleted. Without the right to open that file, the file at
/// the mapping's path, if its inode is that of the mapping.
fn from_file(vma: &Vma, pid: Pid) -> Option<Content> {
    let link = shown(pid, &format!("map_files/{:x}-{:x}", vma.start, vma.end))?;
    let name = shown(pid, &format!("root{}", vma.name))?;
    let direct = regular(Path::new(&link), Links::Follow);
    let file = direct.or_else(|| regular(Path::new(&name), Links::Refuse))?;
    let metadata = file.metadata().ok()?;
    if metadata.ino() != vma.inode {
        return None;
    }
    Mapped::new(&file, metadata.len()).map(Content::Mapped)
}

impl Content {
    /// `None` for memory without a file.
    pub(super) fn reader(&self) -> Option<Box<dyn Reader>> {
        match self {
            Content::Mapped(mapped) => Some(Box::new(mapped.reader().ok()?)),
            Content::Memory(bytes) => Some(Box::new(io::Cursor::new(Arc::clone(bytes)))),
            Content::Anonymous { .. } => None,
        }
    }
}

/// A mapping of a file, never accessed directly.
#[derive(Debug)]
pub(super) struct Mapped {
    begin: NonNull<std::ffi::c_void>,
    length: u64,
}

// SAFETY: only the kernel uses the address; this program never accesses the memory behind it.
unsafe impl Send for Mapped {}

impl Mapped {
    fn new(file: &File, length: u64) -> Option<Mapped> {
        let size = usize::try_from(length).ok().filter(|size| *size > 0)?;
        // SAFETY: a fresh mapping at an address that the kernel chooses replaces no mapping.
        let begin = unsafe {
            mmap(
                ptr::null_mut(),
                size,
                ProtFlags::READ,
                MapFlags::PRIVATE,
                file,
                0,
            )
        };
        Some(Mapped {
            begin: NonNull::new(begin.ok()?)?,
            length,
        })
    }

    fn reader(&self) -> io::Result<MappedReader> {
        Ok(MappedReader {
            memory: File::open("/proc/self/mem")?,
            begin: self.begin.addr().get() as u64,
            length: self.length,
            at: 0,
        })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: `new` mapped exactly this range, and no reference into the range exists.
        let _ = unsafe { munmap(self.begin.as_ptr(), self.length as usize) };
    }
}

struct MappedReader {
    memory: File,
    begin: u64,
    length: u64,
    at: u64,
}

impl Read for MappedReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.length.saturating_sub(self.at);
        let size = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self
            .memory
            .read_at(&mut buffer[..size], self.begin + self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for MappedReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_file_is_an_error_and_kills_no_process() {
        let path = std::env::temp_dir().join(format!("mmun-image-{}", std::process::id()));
        std::fs::write(&path, vec![7; 3 * 4096]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mapped = Mapped::new(&file, 3 * 4096).unwrap();
        let mut reader = mapped.reader().unwrap();
        let mut bytes = [0; 16];
        assert_eq!(
            (
                reader.seek(SeekFrom::Start(8192)).unwrap(),
                reader.read(&mut bytes).unwrap()
            ),
            (8192, 16)
        );
        assert_eq!(bytes, [7; 16]);
        file.set_len(4096).unwrap();
        reader.seek(SeekFrom::Start(8192)).unwrap();
        assert!(reader.read(&mut bytes).is_err());
    }

    #[test]
    fn unwind_tables_of_all_files_together_are_bounded() {
        let tiny = include_bytes!("corrupt/tiny.elf");
        let images = |budget: &mut Budget| {
            let content = Content::Memory(Arc::from(&tiny[..]));
            Image::new("tiny".into(), content, budget).unwrap()
        };
        let mut budget = Budget::default();
        let first = images(&mut budget);
        let size = |part: &Option<(u64, Arc<[u8]>)>| part.as_ref().unwrap().1.len() as u64;
        let used = size(&first.sections.eh_frame) + size(&first.sections.eh_frame_hdr);
        assert_eq!(budget.0, MAX_TOTAL - used);
        budget.0 = used + 1;
        let second = images(&mut budget);
        assert!(second.sections.eh_frame.is_some() && !second.is_partial);
        let last = images(&mut budget);
        assert!(last.is_partial);
        let last = last.sections;
        assert!(last.eh_frame.is_none() && last.eh_frame_hdr.is_none() && last.text.is_some());
        assert!(!Budget::default().take(MAX_SECTION + 1), "one file alone");
    }

    #[test]
    fn the_bias_is_that_of_the_executable_segment() {
        let segments = vec![Segment {
            offset: 0x1234,
            size: 0x5000,
            address: 0x41234,
        }];
        let (path, sections) = (String::new(), Sections::default());
        let image = Image {
            path,
            content: Content::Anonymous {
                pid: 1,
                begin: 0,
                user: None,
            },
            segments,
            sections,
            is_partial: false,
        };
        let vma = |start, offset| Vma {
            start,
            end: start + 0x1000,
            offset,
            ..Vma::default()
        };
        assert_eq!(
            image.bias(&vma(0x7f00_0004_1000, 0x1000), 4096),
            Some(0x7f00_0000_0000)
        );
        assert_eq!(
            image.bias(&vma(0x7f00_0004_3000, 0x3000), 4096),
            Some(0x7f00_0000_0000)
        );
        assert_eq!(image.bias(&vma(0x7f00_0004_3000, 0), 4096), None);
        assert_eq!(
            image.bias(&vma(0x1000, 0x1000), 4096),
            None,
            "no address lies below zero"
        );
        assert_eq!(
            image.bias(&vma(0x7f00_0004_0000, 0), 16384),
            Some(0x7f00_0000_0000),
            "a larger page begins before the segment"
        );
    }
}
