//! The stack memory of a stopped task, read as far as an unwinding needs it.

/// A stack. The buffer is reused for the next stack.
#[derive(Debug)]
pub(super) struct Memory {
    buffer: Vec<u8>,
    /// The stack pointer.
    begin: u64,
    /// How many bytes of the buffer were read.
    have: usize,
    /// Whether the memory after these bytes cannot be read.
    ended: bool,
    /// How many bytes the unwinding has used.
    needed: usize,
}

/// How much of the first stack is read at once.
const FIRST: usize = 16 << 10;
/// Most stacks are as deep as the previous stack, so a little more than that stack needed is read
/// at once, rounded up to this step. Reading an unneeded page costs 0.2 us.
const STEP: usize = 1 << 10;
/// The maximum that is read of a stack.
const MAX_BYTES: usize = 1 << 20;

impl Default for Memory {
    fn default() -> Memory {
        Memory {
            buffer: Vec::new(),
            begin: 0,
            have: 0,
            ended: true,
            needed: FIRST,
        }
    }
}

impl Memory {
    /// Begins a new stack. `read` copies memory of the task and returns how much it could copy.
    pub(super) fn begin(&mut self, stack: u64, read: impl FnOnce(u64, &mut [u8]) -> usize) {
        let size = (self.needed + STEP / 2)
            .next_multiple_of(STEP)
            .min(MAX_BYTES);
        (self.begin, self.have, self.ended, self.needed) = (stack, 0, false, 0);
        self.extend(size, read);
    }

    /// The word at `address`; `None` if the address is below the stack, too far above, or
    /// unreadable.
    pub(super) fn word(
        &mut self,
        address: u64,
        read: impl FnOnce(u64, &mut [u8]) -> usize,
    ) -> Option<u64> {
        let offset = usize::try_from(address.checked_sub(self.begin)?).ok()?;
        let end = offset.checked_add(8).filter(|end| *end <= MAX_BYTES)?;
        self.needed = self.needed.max(end);
        if end > self.have && !self.ended {
            let size = end.max(2 * self.have).next_multiple_of(STEP).min(MAX_BYTES);
            self.extend(size, read);
        }
        let word = self.buffer[..self.have].get(offset..end)?;
        Some(u64::from_le_bytes(word.try_into().expect("eight bytes")))
    }

    fn extend(&mut self, size: usize, read: impl FnOnce(u64, &mut [u8]) -> usize) {
        if self.buffer.len() < size {
            self.buffer.resize(size, 0);
        }
        let room = &mut self.buffer[self.have..size];
        let count = match self.begin.checked_add(self.have as u64) {
            Some(at) => read(at, room).min(room.len()),
            None => 0,
        };
        self.ended = count < room.len();
        self.have += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory from 0x1000 on, each word its own address, up to `end`.
    fn read(end: u64) -> impl Fn(u64, &mut [u8]) -> usize {
        move |at, buffer| {
            let size = buffer.len().min(end.saturating_sub(at) as usize);
            for (offset, byte) in buffer[..size].iter_mut().enumerate() {
                let at = at + offset as u64;
                *byte = (at & !7).to_le_bytes()[(at & 7) as usize];
            }
            size
        }
    }

    #[test]
    fn words_are_read_as_far_as_the_stack_goes() {
        let (mut memory, end) = (Memory::default(), 0x1000 + 0x10000);
        memory.begin(0x1000, read(end));
        for at in [0x1000, 0x1ff8, 0x6008, 0x1000 + 0xfff8] {
            assert_eq!(memory.word(at, read(end)), Some(at));
        }
        assert_eq!(memory.word(end, read(end)), None);
        assert_eq!(
            memory.word(0xff8, read(end)),
            None,
            "below the stack pointer"
        );
        assert_eq!(
            memory.word(0x1000 + MAX_BYTES as u64, |_, _| panic!("too far")),
            None
        );
    }

    #[test]
    fn as_much_is_read_at_once_as_the_stack_before_needed() {
        let (mut memory, mut sizes) = (Memory::default(), Vec::new());
        for needed in [0x100, 0x100, 0x8000, 0x100, 0x100] {
            let mut first = 0;
            memory.begin(0x1000, |at, buffer| {
                first = buffer.len();
                read(1 << 40)(at, buffer)
            });
            sizes.push(first);
            assert_eq!(
                memory.word(0x1000 + needed, read(1 << 40)),
                Some(0x1000 + needed)
            );
        }
        assert_eq!(sizes, [FIRST + STEP, STEP, STEP, 0x8000 + STEP, STEP]);
    }

    #[test]
    fn a_stack_pointer_may_be_anything() {
        for begin in [0, 1, u64::MAX, u64::MAX - 7, 1 << 63] {
            let mut memory = Memory::default();
            memory.begin(begin, |_, _| 0);
            for address in [0, begin, begin.wrapping_add(8), u64::MAX] {
                assert_eq!(memory.word(address, |_, _| panic!("it has ended")), None);
            }
        }
    }
}
