//! Where records go: buffered, and quiet once it is closed.

use std::fs::File;
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

/// The standard error stream, or a file.
#[derive(Debug)]
pub(crate) struct Output {
    file: File,
    path: Option<PathBuf>,
    terminal: bool,
    /// What the file held before is in it still.
    stale: bool,
    /// The first write that failed; nothing is written after it.
    failed: Option<io::Error>,
    pub(crate) buffer: Vec<u8>,
}

const FULL: usize = 1 << 16;
/// A record is shorter than this.
const ROOM: usize = 4096;
/// How long nothing may be read before the rest is not written, once tracing is to end.
const PATIENCE: Duration = Duration::from_secs(2);

impl Output {
    /// The name of what is no file.
    pub(crate) const STDERR: &str = "standard error";

    /// A file that exists is emptied by the first flush.
    ///
    /// # Errors
    /// The file cannot be created, or there is no standard error stream.
    pub(crate) fn open(path: Option<&Path>) -> io::Result<Output> {
        let file = match path {
            Some(path) => File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)?,
            None => File::from(io::stderr().as_fd().try_clone_to_owned()?),
        };
        Ok(Output {
            terminal: file.is_terminal(),
            stale: path.is_some() && file.metadata()?.is_file(),
            file,
            path: path.map(Path::to_owned),
            failed: None,
            buffer: Vec::with_capacity(FULL + ROOM),
        })
    }

    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// The file's name, for messages.
    pub(crate) fn name(&self) -> String {
        self.path
            .as_deref()
            .map_or(Self::STDERR.into(), |path| path.display().to_string())
    }

    /// Writes the buffer if it is full, or at once to a terminal. `true` if that failed just now.
    pub(crate) fn settle(&mut self) -> bool {
        (self.terminal || self.buffer.len() >= FULL) && self.flush()
    }

    /// Writes the buffer. `true` if that failed just now.
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

    /// Drops what is not written yet, and lets a file that nothing was written to be as it was.
    pub(crate) fn discard(&mut self) {
        self.buffer.clear();
        self.stale = false;
    }

    /// What went wrong, if anything did.
    pub(crate) fn failure(&self) -> Option<&io::Error> {
        self.failed.as_ref()
    }
}

/// Puts `text` in the place of what a file holds. Where a disk has no room for it, or its owner may
/// not write so much, what the file held is in it still. A pipe or a device is written to.
///
/// # Errors
/// What the kernel says.
pub(crate) fn replace(file: &mut File, text: &[u8]) -> io::Result<()> {
    let about = file.metadata()?;
    if about.is_file() {
        match rustix::fs::fallocate(&*file, FallocateFlags::empty(), 0, text.len().max(1) as u64) {
            // A file system that cannot reserve room may fail at the write.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => {
                // It may have grown by a part.
                let _ = file.set_len(about.len());
                return Err(error.into());
            }
        }
        file.set_len(text.len() as u64)?;
    }
    file.write_all(text)
}

/// `true` if both names are those of one file that exists.
pub(crate) fn is_same(a: &Path, b: &Path) -> bool {
    let key = |path: &Path| std::fs::metadata(path).map(|about| (about.dev(), about.ino()));
    matches!((key(a), key(b)), (Ok(a), Ok(b)) if a == b)
}

/// As `write_all`, also to a stream that another process made non-blocking, and not for ever: once
/// `stop` is set, a reader who takes nothing for as long as `patience` is given up.
fn write_all(
    file: &mut File,
    mut bytes: &[u8],
    stop: &AtomicBool,
    patience: Duration,
) -> io::Result<()> {
    // What is said to be writable takes so much without waiting.
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
    // The flag can be set while this thread sleeps and another one takes the signal.
    const LOOK: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    let mut stopped = None;
    loop {
        // What went wrong, if anything, the write tells.
        if poll(&mut [PollFd::new(file, PollFlags::OUT)], Some(&LOOK)).is_ok_and(|ready| ready > 0)
        {
            return Ok(());
        }
        // Relaxed: the flag hands nothing over.
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
