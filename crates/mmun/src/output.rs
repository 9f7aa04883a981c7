//! The destination of records: buffered; after a write has failed, the rest is discarded.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::sys::STOP;

/// A standard stream, or a file.
#[derive(Debug)]
pub(crate) struct Output {
    file: File,
    /// For messages.
    name: String,
    /// The file's path, if the file did not exist before.
    made: Option<PathBuf>,
    terminal: bool,
    /// Whether this is a regular file that nothing was written to yet, so it has its old content.
    stale: bool,
    /// The first write that failed; nothing is written after it.
    failed: Option<io::Error>,
    pub(crate) buffer: Vec<u8>,
}

const FULL: usize = 1 << 16;
/// Room for one record beyond [`FULL`]. The buffer grows for a longer record, such as one with a
/// long path.
const ROOM: usize = 4096;
/// After a request to end the trace: how long the reader may read nothing before the rest is
/// discarded.
const PATIENCE: Duration = Duration::from_secs(2);

impl Output {
    /// The name of standard error in messages.
    pub(crate) const STDERR: &str = "standard error";

    /// Opens `path`, or standard error if there is no path. A file that exists is emptied by the
    /// first flush.
    ///
    /// # Errors
    /// The file cannot be created, or there is no such stream.
    pub(crate) fn open(path: Option<&Path>) -> io::Result<Output> {
        let mut made = None;
        let (file, name) = match path {
            None => (
                File::from(io::stderr().as_fd().try_clone_to_owned()?),
                Self::STDERR.into(),
            ),
            Some(path) if is_standard(path) => (stdout()?, STDOUT.into()),
            Some(path) => {
                let (file, is_new) = open_or_make(path)?;
                made = is_new.then(|| path.to_owned());
                (file, path.display().to_string())
            }
        };
        let is_file = path.is_some_and(|path| !is_standard(path)) && file.metadata()?.is_file();
        Ok(Output {
            terminal: file.is_terminal(),
            stale: is_file,
            file,
            name,
            made,
            failed: None,
            buffer: Vec::with_capacity(FULL + ROOM),
        })
    }

    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// The file's name, for messages.
    pub(crate) fn name(&self) -> String {
        self.name.clone()
    }

    /// Writes the buffer if it is full, or at once to a terminal. `true` if this write failed.
    pub(crate) fn settle(&mut self) -> bool {
        (self.terminal || self.buffer.len() >= FULL) && self.flush()
    }

    /// Writes the buffer. `true` if this write failed.
    pub(crate) fn flush(&mut self) -> bool {
        let mut failed_now = false;
        if self.failed.is_none() && (self.stale || !self.buffer.is_empty()) {
            let emptied = if self.stale {
                self.file.set_len(0)
            } else {
                Ok(())
            };
            self.failed = emptied
                .and_then(|()| write_all(&mut self.file, &self.buffer, &STOP, PATIENCE))
                .err();
            self.stale = false;
            failed_now = self.failed.is_some();
        }
        self.buffer.clear();
        failed_now
    }

    /// Discards the buffer. If nothing was written to the file, restores its state: an existing
    /// file keeps its content, and a new file is removed.
    pub(crate) fn discard(&mut self) {
        self.buffer.clear();
        if let Some(path) = self.made.take().filter(|_| self.stale) {
            let _ = std::fs::remove_file(path);
        }
        self.stale = false;
    }

    /// The first error of a write, if any.
    pub(crate) fn failure(&self) -> Option<&io::Error> {
        self.failed.as_ref()
    }
}

/// The name in messages of the stream that `-` stands for.
pub(crate) const STDOUT: &str = "standard output";

/// `true` for `-`: standard input where a file is read, standard output where one is written.
pub(crate) fn is_standard(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Standard output, with a descriptor of its own.
pub(crate) fn stdout() -> io::Result<File> {
    Ok(File::from(io::stdout().as_fd().try_clone_to_owned()?))
}

/// Opens a file for writing without truncating it; `true` if the file is new.
pub(crate) fn open_or_make(path: &Path) -> io::Result<(File, bool)> {
    match File::options().write(true).create_new(true).open(path) {
        Ok(file) => Ok((file, true)),
        // This is also the error for a link to a file that does not exist yet.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let mut options = File::options();
            let file = options
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)?;
            Ok((file, false))
        }
        Err(error) => Err(error),
    }
}

/// Replaces the content of a file by `text`. If the disk is full or a quota is reached, the file
/// keeps its old content, provided that its file system can reserve room. For a pipe or a device,
/// just writes.
///
/// # Errors
/// The errors of the kernel.
pub(crate) fn replace(file: &mut File, text: &[u8]) -> io::Result<()> {
    let about = file.metadata()?;
    if about.is_file() {
        match rustix::fs::fallocate(&*file, FallocateFlags::empty(), 0, text.len().max(1) as u64) {
            // A file system that cannot reserve room may fail at the write.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => {
                // The file may have grown by a part of the text.
                let _ = file.set_len(about.len());
                return Err(error.into());
            }
        }
        file.set_len(text.len() as u64)?;
    }
    file.write_all(text)
}

/// A regular file, whatever its name is: to tell whether a write would destroy what is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// `None` if `path` names no regular file: to write to a device or a pipe destroys nothing.
    pub(crate) fn of_path(path: &Path) -> Option<FileId> {
        FileId::of(&std::fs::metadata(path).ok()?)
    }

    /// `None` if the stream is closed, or no regular file.
    pub(crate) fn of_stream(stream: impl AsFd) -> Option<FileId> {
        let file = File::from(stream.as_fd().try_clone_to_owned().ok()?);
        FileId::of(&file.metadata().ok()?)
    }

    fn of(about: &Metadata) -> Option<FileId> {
        about.is_file().then(|| FileId {
            device: about.dev(),
            inode: about.ino(),
        })
    }
}

/// Refuses an output that would destroy a file of the program: one of its standard streams, or a
/// file that its command line, `words`, names.
///
/// # Errors
/// One line: why `option` of the command `name` must not name `path`.
pub(crate) fn must_not_be_used(
    name: &str,
    (option, path): (&str, &Path),
    words: &[OsString],
) -> Result<(), String> {
    let Some(file) = FileId::of_path(path).filter(|_| !is_standard(path)) else {
        return Ok(());
    };
    let streams = [
        ("standard input", FileId::of_stream(io::stdin())),
        (STDOUT, FileId::of_stream(io::stdout())),
        (Output::STDERR, FileId::of_stream(io::stderr())),
    ];
    let stream = streams.iter().find(|(_, stream)| *stream == Some(file));
    // An empty file has nothing to lose.
    let is_empty = std::fs::metadata(path).is_ok_and(|about| about.len() == 0);
    let is_named = |word: &OsString| FileId::of_path(Path::new(word)) == Some(file);
    let why = match stream {
        Some((stream, _)) => format!("it is the program's {stream}"),
        None if !is_empty && words.iter().any(is_named) => {
            "the program's command line names it as well".into()
        }
        None => return Ok(()),
    };
    let path = path.display();
    Err(format!(
        "{name} on {path}: {why}; {option} must name another file"
    ))
}

/// `true` if both paths name the same existing file.
pub(crate) fn is_same(a: &Path, b: &Path) -> bool {
    let key = |path: &Path| std::fs::metadata(path).map(|about| (about.dev(), about.ino()));
    matches!((key(a), key(b)), (Ok(a), Ok(b)) if a == b)
}

/// Like `Write::write_all`, with two differences. It also works if another process has made the
/// stream non-blocking. And once `stop` is set, it gives up when the reader has read nothing for
/// `patience`.
fn write_all(
    file: &mut File,
    mut bytes: &[u8],
    stop: &AtomicBool,
    patience: Duration,
) -> io::Result<()> {
    // A writable pipe accepts this much without blocking.
    const AT_ONCE: usize = libc::PIPE_BUF;
    let waits = !file.metadata()?.is_file();
    while !bytes.is_empty() {
        let mut part = bytes;
        if waits {
            wait_for_room(file, stop, patience)?;
            part = &bytes[..bytes.len().min(AT_ONCE)];
        }
        match file.write(part) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait_for_room(file: &File, stop: &AtomicBool, patience: Duration) -> io::Result<()> {
    // If another thread takes the signal, this thread continues to sleep although the flag is set.
    // So the sleep has a time limit.
    const LOOK: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    let mut stopped = None;
    loop {
        // Errors are ignored here, because the write reports them.
        if poll(&mut [PollFd::new(file, PollFlags::OUT)], Some(&LOOK)).is_ok_and(|ready| ready > 0)
        {
            return Ok(());
        }
        // Relaxed: the flag publishes no data.
        if stop.load(Relaxed) && stopped.get_or_insert_with(Instant::now).elapsed() >= patience {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::thread;

    fn pipe() -> (io::PipeReader, File) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, File::from(OwnedFd::from(writer)))
    }

    #[test]
    fn a_file_is_replaced_whether_it_was_longer_or_shorter() {
        let path = std::env::temp_dir().join(format!("mmun-replace-{}", std::process::id()));
        for (before, text) in [("", "new"), ("longer", "new"), ("a", "longer"), ("a", "")] {
            std::fs::write(&path, before).unwrap();
            let mut file = File::options().write(true).open(&path).unwrap();
            replace(&mut file, text.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_reader_who_reads_nothing_is_given_up_when_asked_to_stop() {
        let (_reader, mut file) = pipe();
        let (stop, bytes) = (AtomicBool::new(false), vec![1; 1 << 20]);
        thread::scope(|scope| {
            let writer =
                scope.spawn(|| write_all(&mut file, &bytes, &stop, Duration::from_millis(1)));
            stop.store(true, Relaxed);
            let error = writer.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        });
    }

    #[test]
    fn a_reader_who_reads_gets_everything_also_after_the_stop() {
        let (mut reader, mut file) = pipe();
        let stop = AtomicBool::new(true);
        thread::scope(|scope| {
            let writer = scope.spawn(move || {
                write_all(&mut file, &[7; 1 << 20], &stop, Duration::from_secs(600))
            });
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len(), 1 << 20);
            writer.join().unwrap().unwrap();
        });
    }
}
