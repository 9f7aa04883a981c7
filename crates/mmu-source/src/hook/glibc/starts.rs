//! The starts of a module's functions.

/// The table of `.eh_frame_hdr`, by which the unwinder finds the functions of a module. Empty if
/// the module has no such table.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Starts<'a> {
    /// The address of the section. The entries are relative to this address.
    base: u64,
    /// The entries, of [`ENTRY`] bytes each, in order of address. The first half of an entry is the
    /// start of a function.
    entries: &'a [u8],
}

const ENTRY: usize = 8;

impl<'a> Starts<'a> {
    /// Parses the section at `base`. If the table is not sorted, or has a format that linkers do
    /// not write, it counts as empty.
    pub(super) fn parse(section: &'a [u8], base: u64) -> Self {
        /// The encodings in version 1. The first byte is for the count: four bytes. The second is
        /// for the entries: two words of four bytes, signed and relative to `base`.
        const FORM: [u8; 2] = [0x03, 0x3b];
        let parse = || {
            let (&[version, pointer, ref form @ ..], rest) = section.split_first_chunk::<4>()?;
            let has_short_pointer = matches!(pointer & 0x0f, 0x03 | 0x0b);
            if version != 1 || !has_short_pointer || *form != FORM {
                return None;
            }
            let (_, rest) = rest.split_first_chunk::<4>()?;
            let (count, table) = rest.split_first_chunk::<4>()?;
            let size = (u32::from_le_bytes(*count) as usize).checked_mul(ENTRY)?;
            let entries = table.get(..size)?;
            entries
                .chunks_exact(ENTRY)
                .is_sorted_by_key(distance)
                .then_some(Self { base, entries })
        };
        parse().unwrap_or_default()
    }

    /// Returns the last start that is at or below `address`.
    pub(super) fn at_or_before(self, address: u64) -> Option<u64> {
        let index = self.first_after(address).checked_sub(1)?;
        self.start(index)
    }

    /// Returns the first start above `address`.
    #[cfg_attr(
        not(any(target_arch = "x86_64", test)),
        allow(dead_code, reason = "for code that must be decoded from the start")
    )]
    pub(super) fn after(self, address: u64) -> Option<u64> {
        self.start(self.first_after(address))
    }

    fn first_after(self, address: u64) -> usize {
        let (mut low, mut high) = (0, self.entries.len() / ENTRY);
        while low < high {
            let middle = low.midpoint(high);
            if self.start(middle).is_some_and(|start| start <= address) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    fn start(self, index: usize) -> Option<u64> {
        let entry = self.entries.get(index * ENTRY..)?;
        Some(self.base.wrapping_add_signed(distance(entry)?.into()))
    }
}

fn distance(entry: &[u8]) -> Option<i32> {
    entry.first_chunk().map(|bytes| i32::from_le_bytes(*bytes))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::hook::glibc) fn section(form: [u8; 4], starts: &[i32]) -> Vec<u8> {
        let mut section = Vec::from(form);
        section.extend([0; 4]);
        section.extend((starts.len() as u32).to_le_bytes());
        starts
            .iter()
            .for_each(|start| section.extend([start.to_le_bytes(), [0; 4]].concat()));
        section
    }

    pub(in crate::hook::glibc) const USUAL: [u8; 4] = [1, 0x1b, 0x03, 0x3b];

    #[test]
    fn the_function_around_an_address_is_found() {
        let section = section(USUAL, &[-0x300, -0x200, -0x100]);
        let starts = Starts::parse(&section, 0x1000);
        assert_eq!(
            (starts.at_or_before(0xcff), starts.after(0xcff)),
            (None, Some(0xd00))
        );
        assert_eq!(
            (starts.at_or_before(0xd00), starts.after(0xd00)),
            (Some(0xd00), Some(0xe00))
        );
        assert_eq!(
            (starts.at_or_before(0xfff), starts.after(0xfff)),
            (Some(0xf00), None)
        );
    }

    #[test]
    fn a_table_that_cannot_be_trusted_is_empty() {
        let is_empty = |section: &[u8]| Starts::parse(section, 0x1000).entries.is_empty();
        assert!(!is_empty(&section(USUAL, &[0, 1])));
        assert!(is_empty(&section(USUAL, &[1, 0])), "not in order");
        assert!(
            is_empty(&section([1, 0x1b, 0x03, 0x3c], &[0, 1])),
            "eight bytes each"
        );
        assert!(
            is_empty(&section([1, 0xff, 0x03, 0x3b], &[0, 1])),
            "no pointer"
        );
        assert!(is_empty(&section(USUAL, &[0, 1])[..20]), "cut off");
        assert!(is_empty(&[]));
    }
}
