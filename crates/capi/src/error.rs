//! Errors: a negative number for the program, a line of text for its user.

use crate::border::export;
use libc::{c_char, c_int};
use mmu_notifier::GetError;
use mmu_source::Error;
use std::cell::RefCell;
use std::ffi::{CStr, CString};
use std::fmt::Write;
use std::ptr;

pub(crate) const INVALID: &CStr = c"an argument is null, misaligned, empty or out of bounds";
pub(crate) const TOO_NEW: &CStr =
    c"a struct has a field that this library does not know, and that is not zero";
pub(crate) const INHERITED: &CStr =
    c"this object belongs to the parent process: make one here, after the fork";
pub(crate) const IN_CALLBACK: &CStr =
    c"called inside an invalidation or a callback: the call would wait for itself";

mmu_notifier::thread_word! {
    /// The address of the text that `mmun_last_error` returns: a static text, or the text in
    /// `OWNED`. Zero for an empty text. Setting this word allocates nothing, because a function may
    /// fail in the middle of `free`.
    static TEXT: u64 = 0;
}

thread_local! {
    static OWNED: RefCell<CString> = RefCell::new(CString::default());
}

/// Stores `text` as the last error of this thread, and returns `code`.
#[cold]
pub(crate) fn fail(code: c_int, text: &'static CStr) -> c_int {
    TEXT.set(text.as_ptr().expose_provenance() as u64);
    code
}

/// Like [`fail`], with an allocated text.
#[cold]
pub(crate) fn fail_with(code: c_int, text: String) -> c_int {
    let text = CString::new(text.replace('\0', "?")).unwrap_or_default();
    // While a thread ends, `OWNED` may be destroyed already.
    let kept = OWNED.try_with(|owned| {
        let mut owned = owned.borrow_mut();
        *owned = text;
        owned.as_ptr()
    });
    TEXT.set(kept.unwrap_or(ptr::null()).expose_provenance() as u64);
    code
}

/// Formats an error of a source with its remedy as one line.
pub(crate) fn line_of_source(error: &Error) -> String {
    let mut line = match error {
        // Without the second advice, for which `mmun_status` has no room.
        Error::Unavailable {
            source,
            missing,
            remedy,
            ..
        } => format!("source {source} lacks {missing} (try: {remedy})"),
        _ => line(error),
    };
    if let Some(hint) = error.hint() {
        let _ = write!(line, "; {hint}");
    }
    line
}

/// Formats an error and its chain of sources as one line.
pub(crate) fn line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(line, ": {error}");
        source = error.source();
    }
    line
}

/// Stores the error of a source, and returns its error number.
#[cold]
pub(crate) fn of_source(error: &Error) -> c_int {
    let errno = |error: &std::io::Error| -error.raw_os_error().unwrap_or(libc::EIO);
    match error {
        Error::AfterFork { .. } => fail(-libc::ESRCH, INHERITED),
        Error::InCallback { .. } => fail(-libc::EDEADLK, IN_CALLBACK),
        Error::Unavailable { .. } | Error::Unsupported { .. } => {
            fail_with(-libc::EOPNOTSUPP, line_of_source(error))
        }
        Error::Kernel { source, .. } | Error::Arm { source, .. } => {
            fail_with(errno(source), line_of_source(error))
        }
        _ => fail_with(-libc::EIO, line_of_source(error)),
    }
}

/// Stores the error of a cache, and returns its error number. An error number of the registrar is
/// returned unchanged.
#[cold]
pub(crate) fn of_cache(error: &::regcache::Error<Refused>) -> c_int {
    use ::regcache::Error as E;
    match error {
        E::Exited | E::Forked => fail(-libc::ESRCH, INHERITED),
        E::Source { source } => of_source(source),
        E::NotMapped { source, .. }
        | E::LimitReached { source, .. }
        | E::Registrar { source, .. } => fail_with(source.0, line(error)),
        E::Full { .. } => fail_with(-libc::ENOSPC, line(error)),
        E::TooLarge { .. } => fail_with(-libc::EFBIG, line(error)),
        E::Open {
            source: GetError::WouldDeadlock,
        }
        | E::WouldDeadlock => fail(-libc::EDEADLK, IN_CALLBACK),
        _ => fail_with(-libc::ENOMEM, line(error)),
    }
}

/// The negative error number that a C registrar returned.
#[derive(Debug)]
pub struct Refused(pub(crate) c_int);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::io::Error::from_raw_os_error(-self.0).fmt(f)
    }
}

impl std::error::Error for Refused {}

export! {
    /// Returns the text of the last error of this thread.
    ///
    /// # Safety
    /// Has no preconditions.
    fn mmun_last_error() -> *const c_char {
        match TEXT.get() {
            0 => c"".as_ptr(),
            text => ptr::with_exposed_provenance(text as usize),
        }
    }

    /// Returns the meaning of an error number in this library.
    ///
    /// # Safety
    /// Has no preconditions.
    fn mmun_strerror(code: c_int) -> *const c_char {
        let text = match code.checked_neg() {
            Some(0) => c"success",
            Some(libc::EINVAL) => INVALID,
            Some(libc::E2BIG) => TOO_NEW,
            Some(libc::ESRCH) => INHERITED,
            Some(libc::EDEADLK) => IN_CALLBACK,
            Some(libc::EOPNOTSUPP) => c"a source needs something that the machine or the rights of this process do not offer",
            Some(libc::EBUSY) => c"a registration is still leased",
            Some(libc::ENOSPC) => c"the registration cache is full, and every region in it is leased",
            Some(libc::EFBIG) => c"the range is larger than the limit of the registration cache",
            Some(libc::EFAULT) => c"not all of the range is mapped",
            Some(libc::ENOMEM) => c"out of memory or of mappings (sysctl vm.max_map_count), or over the limit of locked memory (ulimit -l)",
            Some(libc::EPERM) => c"operation not permitted",
            Some(libc::EMFILE) => c"the limit of open files is reached (ulimit -n)",
            Some(libc::ENFILE) => c"the system's limit of open files is reached (sysctl fs.file-max)",
            Some(libc::EAGAIN) => c"a limit of threads, processes or locked memory is reached",
            Some(libc::EIO) => c"input/output error",
            _ => c"an error number of the operating system or the registrar",
        };
        text.as_ptr()
    }

    /// Returns the version of the binary interface.
    ///
    /// # Safety
    /// Has no preconditions.
    fn mmun_abi_version() -> u32 {
        ABI_VERSION
    }
}

/// `MMUN_ABI_VERSION`: the major version times 2^16, plus the minor version.
const ABI_VERSION: u32 = 1;
