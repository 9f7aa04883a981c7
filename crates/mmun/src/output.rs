//! Where records go: buffered, and quiet once it is closed.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};

/// The standard error stream, or a file.
#[derive(Debug)]
pub(crate) struct Output {
    file: File,
    path: Option<PathBuf>,
    terminal: bool,
    /// The first write that failed; nothing is written after it.
    failed: Option<io::Error>,
    pub(crate) buffer: Vec<u8>,
}

const FULL: usize = 1 << 16;
/// A record is shorter than this.
const ROOM: usize = 4096;

impl Output {
    /// # Errors
    /// The file cannot be created, or there is no standard error stream.
    pub(crate) fn open(path: Option<&Path>) -> io::Result<Output> {
        let file = match path {
            Some(path) => File::create(path)?,
            None => File::from(io::stderr().as_fd().try_clone_to_owned()?),
        };
        Ok(Output {
            terminal: file.is_terminal(),
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
        self.path.as_deref().map_or("standard error".into(), |path| path.display().to_string())
    }

    /// Writes the buffer if it is full, or at once to a terminal. `true` if that failed just now.
    pub(crate) fn settle(&mut self) -> bool {
        (self.terminal || self.buffer.len() >= FULL) && self.flush()
    }

    /// Writes the buffer. `true` if that failed just now.
    pub(crate) fn flush(&mut self) -> bool {
        let mut failed_now = false;
        if self.failed.is_none() && !self.buffer.is_empty() {
            self.failed = write_all(&mut self.file, &self.buffer).err();
            failed_now = self.failed.is_some();
        }
        self.buffer.clear();
        failed_now
    }

    /// What went wrong, if anything did.
    pub(crate) fn failure(&self) -> Option<&io::Error> {
        self.failed.as_ref()
    }
}

/// As `write_all`, also to a stream that someone else made non-blocking.
fn write_all(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // What went wrong, if anything, the next write tells.
                let _ = poll(&mut [PollFd::new(file, PollFlags::OUT)], None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
