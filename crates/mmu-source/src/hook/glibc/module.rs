//! The modules whose code makes memory calls: libc and the dynamic loader, or the program itself if
//! it is statically linked.

#![allow(unsafe_code, reason = "asks the dynamic loader, and reads code")]

use super::machine::{BREAKPOINT, Code64};
use super::starts::Starts;
use super::{own_process, raw};
use crate::page;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::{ptr, slice};

/// An executable segment of a loaded module.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    /// The file name of the module, without its folder.
    pub(super) module: String,
    pub(super) start: u64,
    pub(super) length: u64,
    path: PathBuf,
    /// The offset of the segment in the file.
    offset: u64,
    /// The address range of the module's table of functions, if it has one.
    unwind: Option<Range<u64>>,
}

/// The original code at a breakpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hidden {
    pub(super) address: u64,
    pub(super) code: Breakpoint,
}

/// The bytes of a breakpoint. A breakpoint is aligned to its own size.
type Breakpoint = [u8; BREAKPOINT.len()];

impl Segment {
    pub(super) fn holds(&self, address: u64) -> bool {
        (self.start..self.start + self.length).contains(&address)
    }

    /// Tells whether the code in memory is not that of the file. False if the file cannot be read,
    /// or was replaced, as by an upgrade.
    pub(super) fn is_changed(&self) -> bool {
        const STEP: usize = 1 << 16;
        // On the heap: the caller may be a thread with a small stack.
        let mut bytes = vec![0; STEP];
        let Ok(file) = File::open(&self.path) else {
            return false;
        };
        if self.is_replaced(&file) {
            return false;
        }
        let code = self.code().bytes;
        code.chunks(STEP).enumerate().any(|(index, code)| {
            let bytes = &mut bytes[..code.len()];
            let at = self.offset + (index * STEP) as u64;
            file.read_exact_at(bytes, at).is_ok() && bytes != code
        })
    }

    /// Tells whether `file`, at the module's path, is another file than the one that is mapped. The
    /// device is not compared, because `/proc` and `stat` give different ones on some file systems.
    fn is_replaced(&self, file: &File) -> bool {
        let Ok(about) = file.metadata() else {
            return true;
        };
        let mut is_mapped = false;
        let listed = own_process::mappings(|mapping| {
            let is_here = mapping.start < self.start + self.length && self.start < mapping.end;
            is_mapped |= is_here && mapping.inode == about.ino();
            !is_mapped
        });
        listed.is_ok() && !is_mapped
    }

    /// Returns the code without breakpoints, and the breakpoints.
    ///
    /// The kernel recognises the breakpoint of a uprobe by the file that is mapped at its address,
    /// and kills a thread that executes the same breakpoint elsewhere. So a copy must have the
    /// original code.
    ///
    /// # Errors
    /// The errors of `mmap`.
    pub(super) fn without_breakpoints(&self) -> Result<(Text, Vec<Hidden>), i32> {
        let code = self.code().bytes;
        let read = |open: File| {
            hidden(code, |at, into| {
                open.read_exact_at(into, self.offset + at as u64)
            })
        };
        // If the file cannot be opened, breakpoints cannot be detected.
        let hidden = File::open(&self.path).and_then(read).unwrap_or_default();
        let text = if hidden.is_empty() {
            Text::InPlace(code)
        } else {
            Text::Copy(Scratch::new(code, &hidden)?)
        };
        let at = |(index, code)| Hidden {
            address: self.start + index as u64,
            code,
        };
        Ok((text, hidden.into_iter().map(at).collect()))
    }

    /// Returns the starts of the module's functions.
    pub(super) fn starts(&self) -> Starts<'static> {
        let Some(table) = &self.unwind else {
            return Starts::default();
        };
        // SAFETY: the memory must be readable, must never change, and must stay mapped. The loader
        // says that the table is in a read-only segment of libc or of the loader. Neither is ever
        // unloaded.
        let section = unsafe {
            slice::from_raw_parts(
                ptr::with_exposed_provenance(table.start as usize),
                (table.end - table.start) as usize,
            )
        };
        Starts::parse(section, table.start)
    }

    /// Returns the code of the segment.
    pub(super) fn code(&self) -> Code64<'static> {
        // SAFETY: the memory must be readable and must stay mapped. This is code of libc or of the
        // loader, and neither is ever unloaded. If another library patches the code meanwhile, a
        // read returns the old or the new bytes, and `apply` compares them again before it replaces
        // anything.
        let bytes = unsafe {
            slice::from_raw_parts(
                ptr::with_exposed_provenance(self.start as usize),
                self.length as usize,
            )
        };
        Code64 {
            bytes,
            start: self.start,
        }
    }
}

/// Code without breakpoints.
#[derive(Debug)]
pub(super) enum Text {
    /// The code itself, if no breakpoints were detected.
    InPlace(&'static [u8]),
    Copy(Scratch),
}

impl Deref for Text {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Text::InPlace(code) => code,
            Text::Copy(copy) => copy.bytes(),
        }
    }
}

/// A changed copy of a module's code, in a mapping of its own. The mapping does not come from the
/// program's allocator: the free of so large a block would change the allocator's thresholds for
/// the program's own blocks.
#[derive(Debug)]
pub(super) struct Scratch {
    at: u64,
    length: usize,
}

impl Scratch {
    fn new(code: &[u8], changes: &[(usize, Breakpoint)]) -> Result<Self, i32> {
        let length = code.len();
        let at = raw::mmap(0, length as u64, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        // SAFETY: the memory must be valid and unshared. The memory was mapped above with this
        // length and zeroed, and no other code refers to it.
        let copy = unsafe {
            slice::from_raw_parts_mut(ptr::with_exposed_provenance_mut::<u8>(at as usize), length)
        };
        copy.copy_from_slice(code);
        for (index, code) in changes {
            copy[*index..][..code.len()].copy_from_slice(code);
        }
        Ok(Self { at, length })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the memory must be readable and must not change. This value owns the mapping, and
        // writes to it only in `new`.
        unsafe {
            slice::from_raw_parts(ptr::with_exposed_provenance(self.at as usize), self.length)
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and no borrow of it is left.
        let _ = unsafe { raw::munmap(self.at, self.length as u64) };
    }
}

/// Finds the original code at each breakpoint, with the offset of the breakpoint. A breakpoint
/// stands alone. If bytes near it also differ from the file, they are another library's patch, or
/// the file is a different one.
///
/// The function reads the file in pieces, because freeing a block as large as libc would change how
/// the program's allocator behaves.
fn hidden(
    code: &[u8],
    read: impl Fn(usize, &mut [u8]) -> io::Result<()>,
) -> io::Result<Vec<(usize, Breakpoint)>> {
    const SIZE: usize = BREAKPOINT.len();
    const NEAR: usize = 8;
    const PIECE: usize = 16 << 10;
    let mut piece = vec![0; PIECE];
    let mut found = Vec::new();
    for start in (0..code.len()).step_by(PIECE) {
        let code = &code[start..(start + PIECE).min(code.len())];
        let file = &mut piece[..code.len()];
        read(start, file)?;
        if code == file {
            continue;
        }
        let pairs = code.chunks_exact(SIZE).zip(file.chunks_exact(SIZE));
        let differs = pairs.enumerate().filter_map(|(index, (code, file))| {
            let is_breakpoint = code == BREAKPOINT && file != BREAKPOINT;
            is_breakpoint.then(|| (start + index * SIZE, file.try_into().expect("its size")))
        });
        found.extend(differs);
    }
    let mut alone = Vec::new();
    for (index, original) in found {
        let near = index.saturating_sub(NEAR)..(index + SIZE + NEAR).min(code.len());
        let mut file = [0; 2 * NEAR + SIZE];
        let file = &mut file[..near.len()];
        read(near.start, file)?;
        file[index - near.start..][..SIZE].copy_from_slice(&BREAKPOINT);
        if *file == code[near] {
            alone.push((index, original));
        }
    }
    Ok(alone)
}

/// Finds the code of libc and of the loader, or that of the program itself if it is statically
/// linked.
///
/// `dl_iterate_phdr` would list all modules, but it takes a lock that `fork` does not release in
/// the child. If another thread forked during the call, the child's own call would wait for ever.
/// `fork` does release the locks of the loader functions that are used here.
pub(super) fn segments() -> Vec<Segment> {
    // `__tls_get_addr` is a function of the loader, and libc depends on it.
    let known = [c"munmap", c"__tls_get_addr"].map(libc_function);
    let mut found: Vec<Segment> = Vec::new();
    for address in known.into_iter().flatten() {
        if found.iter().any(|segment| segment.holds(address)) {
            continue;
        }
        let Some(info) = info_at(address) else {
            continue;
        };
        // SAFETY: the loader's name of a module is a C string. libc and the loader stay loaded.
        let path = unsafe { CStr::from_ptr(info.dli_fname) };
        if let Some(headers) = headers_at(info.dli_fbase.expose_provenance() as u64) {
            found.extend(executable(path, headers));
        }
    }
    let is_libc = |segment: &Segment| {
        segment.module.starts_with("libc.so.") || segment.module.starts_with("ld-linux")
    };
    found.retain(is_libc);
    if found.is_empty() {
        found.extend(
            own_headers()
                .map(|headers| executable(c"", headers))
                .unwrap_or_default(),
        );
    }
    found
}

/// The program headers of a module, and its load address.
#[derive(Debug, Clone, Copy)]
struct Headers {
    all: &'static [libc::Elf64_Phdr],
    /// The difference between an address in memory and the same address in the file.
    bias: u64,
}

/// Returns the headers of the module whose file's first page is mapped at `base`.
fn headers_at(base: u64) -> Option<Headers> {
    // SAFETY: the memory must be readable and must stay mapped. `base` is where libc or the loader
    // begins, as the loader reports it, or where the program begins, as the kernel reports it. Each
    // of them begins with this header.
    let file = unsafe { &*ptr::with_exposed_provenance::<libc::Elf64_Ehdr>(base as usize) };
    if file.e_ident[..4] != *b"\x7fELF" {
        return None;
    }
    let (at, count) = (base + file.e_phoff, usize::from(file.e_phnum));
    // SAFETY: the memory must be readable and must stay mapped. libc, the loader and the program
    // each have their program headers in their first segment, and none of the three is ever
    // unmapped.
    let all: &[libc::Elf64_Phdr] =
        unsafe { slice::from_raw_parts(ptr::with_exposed_provenance(at as usize), count) };
    let first = all.iter().find(|header| header.p_type == libc::PT_LOAD)?;
    let bias = base.wrapping_sub(page::down(first.p_vaddr));
    Some(Headers { all, bias })
}

/// Returns the headers of the program, whose address the kernel passed to it.
fn own_headers() -> Option<Headers> {
    // SAFETY: takes an integer.
    let at = unsafe { libc::getauxval(libc::AT_PHDR) };
    // The headers are in the file's first page. A static PIE has no `PT_PHDR`, so its load address
    // cannot be computed from the headers alone.
    (at != 0).then(|| headers_at(page::down(at))).flatten()
}

/// Returns the executable segments of a module.
fn executable(path: &CStr, Headers { all, bias }: Headers) -> Vec<Segment> {
    let path = PathBuf::from(OsStr::from_bytes(path.to_bytes()));
    let module = path.file_name().unwrap_or_default().to_string_lossy();
    let range = |header: &libc::Elf64_Phdr| {
        let start = bias.wrapping_add(header.p_vaddr);
        start..start + header.p_memsz
    };
    let unwind = all
        .iter()
        .find(|header| header.p_type == libc::PT_GNU_EH_FRAME)
        .map(range);
    all.iter()
        .filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_X != 0)
        .map(|header| Segment {
            module: module.clone().into_owned(),
            start: range(header).start,
            length: header.p_memsz,
            path: path.clone(),
            offset: header.p_offset,
            unwind: unwind.clone(),
        })
        .collect()
}

/// Asks the loader which module and symbol an address belongs to.
fn info_at(address: u64) -> Option<libc::Dl_info> {
    let mut info = libc::Dl_info {
        dli_fname: ptr::null(),
        dli_fbase: ptr::null_mut(),
        dli_sname: ptr::null(),
        dli_saddr: ptr::null_mut(),
    };
    // SAFETY: the call accepts any address, and writes one structure.
    let found = unsafe { libc::dladdr(ptr::without_provenance(address as usize), &mut info) };
    (found != 0).then_some(info)
}

/// A function that a module exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Function {
    pub(super) name: String,
    pub(super) entry: u64,
}

/// Finds the function that contains an address.
pub(super) fn function_at(address: u64) -> Option<Function> {
    let info = info_at(address).filter(|info| !info.dli_sname.is_null())?;
    // SAFETY: the loader's name of a symbol is a C string, and the module stays loaded.
    let name = unsafe { CStr::from_ptr(info.dli_sname) }.to_str().ok()?;
    Some(Function {
        name: name.to_owned(),
        entry: info.dli_saddr.addr() as u64,
    })
}

/// Returns the address of libc's function, even if another library has a function of the same name.
pub(super) fn libc_function(name: &CStr) -> Option<u64> {
    // SAFETY: the name is that of a loaded library, so no library is loaded and no initialiser
    // runs.
    let libc = unsafe { libc::dlopen(c"libc.so.6".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    if libc.is_null() {
        return None;
    }
    // SAFETY: the handle comes from the call above, and the name is a C string.
    let function = unsafe { libc::dlsym(libc, name.as_ptr()) };
    // SAFETY: the handle is closed once. libc stays loaded without it.
    unsafe { libc::dlclose(libc) };
    (!function.is_null()).then(|| function.expose_provenance() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_breakpoint_stands_alone_and_a_patch_does_not() {
        const SIZE: usize = BREAKPOINT.len();
        let file = [0x90; 64];
        let mut code = file;
        for at in [20, 64 - SIZE] {
            code[at..][..SIZE].copy_from_slice(&BREAKPOINT);
        }
        // Another library's jump. A part of it looks like a breakpoint.
        code[36..40].fill(0xe9);
        code[40..][..SIZE].copy_from_slice(&BREAKPOINT);
        let read = |at: usize, into: &mut [u8]| {
            into.copy_from_slice(&file[at..][..into.len()]);
            Ok(())
        };
        assert_eq!(
            hidden(&code, read).expect("it can be read"),
            [(20, [0x90; SIZE]), (64 - SIZE, [0x90; SIZE])]
        );
    }

    #[test]
    fn a_changed_copy_of_code() {
        const SIZE: usize = BREAKPOINT.len();
        let copy = Scratch::new(&[0x90; 5000], &[(5000 - SIZE, [0xc3; SIZE])]).expect("memory");
        let (same, changed) = copy.bytes().split_at(5000 - SIZE);
        assert!(same.iter().all(|byte| *byte == 0x90));
        assert_eq!(changed, [0xc3; SIZE]);
    }

    #[test]
    fn another_file_at_the_path_does_not_mean_that_the_code_was_patched() {
        let path = std::env::temp_dir().join(format!("mmu-replaced-{}", std::process::id()));
        for segment in segments() {
            let mut file = std::fs::read(&segment.path).expect("the module's file");
            file[segment.offset as usize + 64] ^= 1;
            std::fs::write(&path, file).expect("a new file");
            let replaced = Segment {
                path: path.clone(),
                ..segment
            };
            let is_changed = replaced.is_changed();
            std::fs::remove_file(&path).expect("it is there");
            assert!(!is_changed, "{}", replaced.module);
        }
    }

    #[test]
    fn a_scan_of_some_functions_finds_the_same_sites_as_a_scan_of_all_code() {
        for segment in segments() {
            let starts = segment.starts();
            assert!(
                starts
                    .after(segment.start)
                    .is_some_and(|at| segment.holds(at)),
                "{} has a table",
                segment.module
            );
            let is_generic =
                |at| function_at(at).is_some_and(|function| function.name == "syscall");
            let some = segment.code().sites(starts, is_generic);
            assert!(some.len() > 2, "{some:?}");
            assert_eq!(some, segment.code().sites(Starts::default(), is_generic));
        }
    }

    #[test]
    fn libc_is_found_with_its_functions() {
        let segments = segments();
        let libc = segments
            .iter()
            .find(|segment| segment.module.starts_with("libc.so"))
            .expect("linked with libc");
        let all = segments
            .iter()
            .flat_map(|segment| segment.code().sites(segment.starts(), |_| false))
            .collect::<Vec<_>>();
        let munmap = all
            .iter()
            .filter(|site| site.number == Some(libc::SYS_munmap as u32));
        assert!(munmap.clone().count() >= 2, "libc and the loader: {all:?}");
        let own = munmap
            .clone()
            .find(|site| (libc.start..libc.start + libc.length).contains(&site.address));
        let function =
            function_at(own.expect("libc has one").address).expect("it is in a function");
        assert!(function.name.contains("munmap"), "{function:?}");
    }
}
