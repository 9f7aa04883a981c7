//! Another process, which acts on this process's memory or files on command.

use std::fs::File;
use std::io::{self, Read, Write};

use crate::sys::{self, Fork};

/// A child that waits for a command. It ends when this process ends.
#[derive(Debug)]
pub(crate) struct Other {
    order: File,
    answer: File,
}

impl Other {
    /// Starts a child that runs `act` once, with the two integers that `Other::act` sends.
    pub(crate) fn start(act: impl FnOnce(usize, usize) -> io::Result<()>) -> io::Result<Other> {
        let (mut orders, order) = sys::pipe()?;
        let (answer, mut answers) = sys::pipe()?;
        match sys::fork()? {
            (Fork::Parent(_), _held) => Ok(Other { order, answer }),
            (Fork::Child, _held) => {
                // Close the parent's ends, or the child could not detect the end of its parent.
                drop((order, answer));
                let mut numbers = [0; 16];
                if orders.read_exact(&mut numbers).is_ok() {
                    let (a, b) = numbers.split_at(8);
                    let number = |bytes: &[u8]| {
                        usize::from_ne_bytes(bytes.try_into().expect("half of sixteen"))
                    };
                    let errno = match act(number(a), number(b)) {
                        Ok(()) => 0,
                        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
                    };
                    // This fails if the parent has ended, which is harmless.
                    let _ = answers.write_all(&errno.to_ne_bytes());
                }
                sys::exit_now(0)
            }
        }
    }

    /// Sends the two integers, and waits until the child has acted.
    ///
    /// # Errors
    /// The error of `act` in the child, or of the pipe if the child has died.
    pub(crate) fn act(mut self, a: usize, b: usize) -> io::Result<()> {
        let mut numbers = [0; 16];
        numbers[..8].copy_from_slice(&a.to_ne_bytes());
        numbers[8..].copy_from_slice(&b.to_ne_bytes());
        self.order.write_all(&numbers)?;
        let mut errno = [0; 4];
        self.answer.read_exact(&mut errno)?;
        match i32::from_ne_bytes(errno) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}
