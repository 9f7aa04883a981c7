//! Unwind tables of code that signs return addresses (pointer authentication of aarch64).
//!
//! The unwind table of a function that signs its return address has an instruction of the vendor
//! ARM, without operands. The unwinder does not know that instruction, and drops the whole row. But
//! the unwinder removes signatures from all return addresses in any case. So this module replaces
//! the instruction by one that does nothing.

const NOTHING: u8 = 0;
/// `DW_CFA_AARCH64_negate_ra_state_with_pc` and `DW_CFA_AARCH64_negate_ra_state`.
const NEGATE: [u8; 2] = [0x2c, 0x2d];
/// Encodings of pointers: the low four bits are the format.
const ABSOLUTE: u8 = 0;
const OMITTED: u8 = 0xff;

/// Replaces the instructions in all entries of `.eh_frame`. If an entry has an unknown encoding or
/// instruction, the entry is not changed from there on.
pub(super) fn replace(section: &mut [u8]) {
    let mut at = 0;
    while let Some((begin, end)) = entry(section, at) {
        let _ = replace_in(section, begin, end);
        at = end;
    }
}

/// Returns the bounds of the entry at `at`, without its field of the length.
fn entry(section: &[u8], at: usize) -> Option<(usize, usize)> {
    let mut cursor = Cursor { bytes: section, at };
    let length = match cursor.number(4)? {
        0 => return None,
        0xffff_ffff => cursor.number(8)?,
        length => length,
    };
    let end = cursor.at.checked_add(usize::try_from(length).ok()?)?;
    (end <= section.len()).then_some((cursor.at, end))
}

fn replace_in(section: &mut [u8], begin: usize, end: usize) -> Option<()> {
    let id = usize::try_from(Cursor::new(section, begin, end).number(4)?).ok()?;
    let own = begin + 4;
    let (common, mut at) = if id == 0 {
        common(section, own, end)?
    } else {
        // The field is the distance from itself to the length of the common entry.
        let (begin, end) = entry(section, begin.checked_sub(id)?)?;
        (common(section, begin + 4, end)?.0, own)
    };
    if id != 0 {
        let mut cursor = Cursor::new(section, at, end);
        cursor.pointer(common.pointers)?;
        cursor.pointer(common.pointers & 15)?;
        if common.is_augmented {
            cursor.block()?;
        }
        at = cursor.at;
    }
    while at < end {
        if NEGATE.contains(&section[at]) {
            section[at] = NOTHING;
        }
        let mut cursor = Cursor::new(section, at, end);
        cursor.instruction(common.pointers)?;
        at = cursor.at;
    }
    Some(())
}

/// The parts of a common entry that decide how the entries of its functions are read.
struct Common {
    is_augmented: bool,
    /// The encoding of the functions' addresses.
    pointers: u8,
}

/// Reads a common entry from `begin`, after its id. Also returns the offset of its instructions.
fn common(section: &[u8], begin: usize, end: usize) -> Option<(Common, usize)> {
    let mut cursor = Cursor::new(section, begin, end);
    let version = cursor.byte()?;
    let text = cursor.at;
    while cursor.byte()? != 0 {}
    let augmentation = &section[text..cursor.at - 1];
    cursor.leb()?;
    cursor.leb()?;
    if version == 1 {
        cursor.byte()?;
    } else {
        cursor.leb()?;
    }
    let mut common = Common {
        is_augmented: false,
        pointers: ABSOLUTE,
    };
    let Some((b'z', fields)) = augmentation.split_first() else {
        return augmentation.is_empty().then_some((common, cursor.at));
    };
    common.is_augmented = true;
    let mut data = Cursor { ..cursor };
    cursor.block()?;
    data.leb()?;
    for field in fields {
        match field {
            b'R' => common.pointers = data.byte()?,
            b'L' => drop(data.byte()?),
            b'P' => {
                let encoding = data.byte()?;
                data.pointer(encoding)?;
            }
            // `S` (a signal's frame), `B` (keys of signatures), `G` (tagged memory) have no data.
            _ => {}
        }
    }
    Some((common, cursor.at))
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn new(section: &'a [u8], at: usize, end: usize) -> Self {
        Self {
            bytes: &section[..end],
            at,
        }
    }

    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// Reads a little-endian number of `size` bytes.
    fn number(&mut self, size: usize) -> Option<u64> {
        (0..size).try_fold(0, |number, at| {
            Some(number | u64::from(self.byte()?) << (8 * at))
        })
    }

    /// Reads a number of variable length.
    fn leb(&mut self) -> Option<u64> {
        let (mut number, mut shift) = (0, 0);
        loop {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            shift += 7;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
    }

    fn skip(&mut self, count: u64) -> Option<()> {
        let at = self.at.checked_add(usize::try_from(count).ok()?)?;
        self.at = (at <= self.bytes.len()).then_some(at)?;
        Some(())
    }

    /// Skips a number of variable length and as many bytes.
    fn block(&mut self) -> Option<()> {
        let count = self.leb()?;
        self.skip(count)
    }

    fn pointer(&mut self, encoding: u8) -> Option<()> {
        if encoding == OMITTED {
            return Some(());
        }
        match encoding & 15 {
            1 | 9 => self.leb().map(drop),
            2 | 10 => self.skip(2),
            3 | 11 => self.skip(4),
            0 | 4 | 12 => self.skip(8),
            _ => None,
        }
    }

    /// Skips an instruction. The opcodes are the `DW_CFA_` constants of DWARF and GNU.
    fn instruction(&mut self, pointers: u8) -> Option<()> {
        let byte = self.byte()?;
        let numbers = match byte {
            // advance_loc, restore; nop, remember_state, restore_state
            0x40..=0x7f | 0xc0..=0xff | 0x00 | 0x0a | 0x0b => 0,
            0x01 => return self.pointer(pointers),
            // advance_loc1, advance_loc2, advance_loc4
            0x02..=0x04 => return self.skip(1 << (byte - 2)),
            // offset; the extended forms, def_cfa_register, def_cfa_offset, args_size
            0x80..=0xbf | 0x06..=0x08 | 0x0d | 0x0e | 0x13 | 0x2e => 1,
            // offset_extended, register, def_cfa, their signed forms, val_offset
            0x05 | 0x09 | 0x0c | 0x11 | 0x12 | 0x14 | 0x15 | 0x2f => 2,
            0x0f => return self.block(),
            // expression, val_expression
            0x10 | 0x16 => {
                self.leb()?;
                return self.block();
            }
            _ => return None,
        };
        (0..numbers).try_for_each(|_| self.leb().map(drop))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry, preceded by its length.
    fn with_length(bytes: &[u8]) -> Vec<u8> {
        let length = u32::try_from(bytes.len()).unwrap().to_le_bytes();
        [&length, bytes].concat()
    }

    /// A common entry as GCC writes it, and the entry of a function with these instructions.
    fn table(instructions: &[u8]) -> Vec<u8> {
        // Id 0, version 1, "zR", factors 4 and -8, register 30, pointers relative to themselves;
        // the frame is at register 31.
        let common = with_length(b"\0\0\0\0\x01zR\0\x04\x78\x1e\x01\x1b\x0c\x1f\0");
        let distance = u32::try_from(common.len() + 4).unwrap().to_le_bytes();
        let function = [&distance[..], &[0x2d; 8], &[0], instructions].concat();
        [&common[..], &with_length(&function), &[0; 4]].concat()
    }

    #[test]
    fn the_instruction_is_replaced_and_operands_with_its_value_are_not() {
        // advance, negate, def_cfa_offset 45, offset of register 29 at 45, an expression with 45
        // in it, advance_loc1 by 45, negate.
        let before = [
            0x41, 0x2d, 0x0e, 0x2d, 0x9d, 0x2d, 0x10, 0x2d, 0x02, 0x2d, 0x2c, 0x02, 0x2d, 0x2d,
        ];
        let mut after = before;
        (after[1], after[13]) = (0, 0);
        let mut section = table(&before);
        replace(&mut section);
        assert_eq!(section, table(&after));
    }

    #[test]
    fn a_cut_or_unknown_entry_stays_and_the_next_is_read() {
        let unknown = table(&[0x2d, 0x3f, 0x2d]);
        let mut section = unknown.clone();
        replace(&mut section);
        assert_eq!(section, table(&[0, 0x3f, 0x2d]));
        let mut two = [&unknown[..unknown.len() - 4], &table(&[0x2d])].concat();
        replace(&mut two);
        assert!(two.ends_with(&table(&[0])));
        for length in 0..unknown.len() {
            replace(&mut unknown[..length].to_vec());
        }
    }
}
