//! Names frames in a child process. The traced program chose the files, and a file can make the
//! DWARF readers overflow their stack, exhaust memory or never end. In a child, such a file
//! costs only its own names, not the trace.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};

use rustix::io::retry_on_intr;
use rustix::process::{WaitOptions, getpid, waitpid};

use super::guard::guarded;
use super::site::Frame;
use crate::sys::{self, Fork};

/// The frames of each address of a file.
pub(super) type Named = Vec<Vec<Frame>>;

/// After this many children have died, the remaining files get no names.
const MOST_CHILDREN: usize = 8;
/// The time limit of one file.
const SECONDS: u32 = 60;
/// The memory limit of a child.
const MEMORY: u64 = 4 << 30;
/// The maximum length of a child's answer for one file.
const MAX_ANSWER: u32 = 256 << 20;

/// Runs `name` for each of `files`, in a child. A file that kills its child gets no names, and
/// another child continues with the next file.
pub(super) fn each<T>(files: &[T], name: impl Fn(&T) -> Named) -> Vec<Named> {
    each_within(SECONDS, files, name)
}

fn each_within<T>(seconds: u32, files: &[T], name: impl Fn(&T) -> Named) -> Vec<Named> {
    // Install the panic hook before the fork, because the child could inherit it half-installed by
    // another thread.
    guarded(|| ());
    let mut all = Vec::with_capacity(files.len());
    for _ in 0..MOST_CHILDREN {
        let left = &files[all.len()..];
        if left.is_empty() || run(seconds, left, &name, &mut all).is_err() {
            break;
        }
        if all.len() < files.len() {
            all.push(Named::new());
        }
    }
    all.resize(files.len(), Named::new());
    all
}

/// Runs one child. `all` gets the child's answers, in order, until the child ends.
///
/// # Errors
/// `EAGAIN`, `ENOMEM`, `EMFILE`: no child could be made.
fn run<T>(
    seconds: u32,
    files: &[T],
    name: impl Fn(&T) -> Named,
    all: &mut Vec<Named>,
) -> io::Result<()> {
    let (reader, writer) = sys::pipe()?;
    let parent = Some(getpid());
    let (side, held) = sys::fork()?;
    match side {
        Fork::Child => {
            // Ending signals stay blocked, because the parent handles them.
            guarded(|| {
                drop(reader);
                sys::be_expendable(parent, MEMORY);
                let mut writer = BufWriter::new(writer);
                let mut tell = |file| {
                    sys::end_in(seconds);
                    tell(&mut writer, &guarded(|| name(file)).unwrap_or_default())
                };
                files.iter().try_for_each(&mut tell)
            });
            sys::exit_now(0)
        }
        Fork::Parent(child) => {
            drop((held, writer));
            let mut reader = BufReader::new(reader);
            let heard = std::iter::from_fn(|| hear(&mut reader));
            all.extend(heard.take(files.len()));
            drop(reader);
            // This fails if another thread waits for all children and has reaped this child.
            let _ = retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()));
            Ok(())
        }
    }
}

/// Writes the length of the message, the count of addresses, and for each address the count of its
/// frames and the frames.
fn tell(writer: &mut BufWriter<File>, named: &Named) -> io::Result<()> {
    let mut out = Vec::new();
    put_number(&mut out, named.len());
    for frames in named {
        put_number(&mut out, frames.len());
        for frame in frames {
            out.push(frame.has_name.into());
            for text in [&frame.function, &frame.module, &frame.line] {
                put_number(&mut out, text.len());
                out.extend_from_slice(text.as_bytes());
            }
        }
    }
    let mut length = Vec::new();
    put_number(&mut length, out.len());
    writer.write_all(&length)?;
    writer.write_all(&out)?;
    writer.flush()
}

fn put_number(out: &mut Vec<u8>, number: usize) {
    out.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
}

/// Reads an answer; `None` if the child has ended or the answer is malformed.
fn hear(reader: &mut impl Read) -> Option<Named> {
    let mut length = [0; 4];
    reader.read_exact(&mut length).ok()?;
    let length = Some(u32::from_le_bytes(length)).filter(|length| *length <= MAX_ANSWER)?;
    let mut bytes = Vec::new();
    let read = reader.take(length.into()).read_to_end(&mut bytes).ok()?;
    let mut said = Said(bytes.get(..length as usize).filter(|_| read > 0)?);
    let named = said.list(|said| {
        said.list(|said| {
            Some(Frame {
                has_name: *said.take(1)?.first()? != 0,
                function: said.text()?,
                module: said.text()?,
                line: said.text()?,
            })
        })
    });
    named.filter(|_| said.0.is_empty())
}

/// The unread rest of a message.
struct Said<'a>(&'a [u8]);

impl<'a> Said<'a> {
    fn take(&mut self, size: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(size)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<usize> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?) as usize)
    }

    fn text(&mut self) -> Option<String> {
        let size = self.number()?;
        String::from_utf8(self.take(size)?.to_vec()).ok()
    }

    fn list<T>(&mut self, mut one: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        (0..self.number()?).map(|_| one(self)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Named {
        let frame = Frame {
            function: text.into(),
            line: "a.c:1".into(),
            ..Frame::default()
        };
        vec![vec![frame.clone(), frame], Vec::new()]
    }

    #[test]
    fn a_file_that_kills_its_child_has_no_names_and_the_others_have() {
        let named = each(&["a", "dies", "b", "panics", "c"], |file| match *file {
            "dies" => std::process::abort(),
            "panics" => panic!("not shown"),
            file => of(file),
        });
        assert_eq!(named, [of("a"), vec![], of("b"), vec![], of("c")]);
    }

    #[test]
    fn an_endless_file_is_given_up() {
        let named = each_within(1, &["loops"], |_| {
            loop {
                std::hint::spin_loop();
            }
        });
        assert_eq!(named, [Named::new()]);
    }

    #[test]
    fn unlimited_memory_is_refused() {
        let named = each(&[0_u8, 1], |file| {
            if *file == 0 {
                std::hint::black_box(vec![1_u8; 5 << 30]);
            }
            of("a")
        });
        assert_eq!(named, [vec![], of("a")]);
    }

    #[test]
    fn many_deaths_are_not_waited_for() {
        let named = each(&[(); 1000], |()| std::process::abort());
        assert!(named.len() == 1000 && named.iter().all(Vec::is_empty));
    }

    #[test]
    fn a_truncated_message_is_no_answer() {
        let mut out = vec![9, 0, 0, 0, 1, 0, 0, 0];
        out.extend([1, 0, 0, 0, 7]);
        assert_eq!(hear(&mut &out[..]), None);
        assert_eq!(hear(&mut &[][..]), None);
        assert_eq!(hear(&mut &[4, 0, 0, 0, 0, 0, 0, 0][..]), Some(vec![]));
        assert_eq!(hear(&mut &[4, 0, 0, 0, 255, 255, 255, 255][..]), None);
    }
}
