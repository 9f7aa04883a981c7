//! The mappings that calls make, for tracers with [`super::Options::births`].

use mmu_notifier::{Va, VaRange};

use super::abi::Call;
use super::{Pid, maps};
use crate::{page, ranges};

/// The mapping that a call makes if it succeeds, relative to the result of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Birth {
    /// This many bytes, starting at the result.
    Bytes(u64),
    /// The heap, which ends at the result.
    Heap,
    /// A mapping that starts at the result, and whose size is in `/proc`.
    One,
}

impl Birth {
    /// Returns `None` for a call that makes no mapping, and for `ipc`, which stores its result in
    /// memory.
    pub(super) fn of(call: Call, args: &[u64; 6]) -> Option<Birth> {
        match call {
            Call::Mmap => Some(Birth::Bytes(args[1])),
            Call::Mremap => Some(Birth::Bytes(args[2])),
            Call::Brk => Some(Birth::Heap),
            Call::OldMmap | Call::Shmat => Some(Birth::One),
            _ => None,
        }
    }

    /// Returns the range that is mapped after the call of `tid` has returned `result`. Returns
    /// `None` if the call failed, or if `/proc` does not show the mapping.
    pub(super) fn range(self, tid: Pid, result: u64) -> Option<VaRange> {
        if result == 0 || (-4095..0).contains(&(result as i64)) {
            return None;
        }
        let holding = |address| {
            let maps = maps::read(tid).ok()?;
            maps::holding(&maps, address).copied()
        };
        match self {
            Birth::Bytes(bytes) => VaRange::covering(Va::new(result), bytes)
                .ok()
                .map(ranges::whole_pages),
            Birth::Heap => VaRange::new(
                Va::new(holding(result - 1)?.start),
                Va::new(page::up(result)),
            )
            .ok(),
            Birth::One => {
                let mapping = holding(result)?;
                VaRange::new(Va::new(mapping.start), Va::new(mapping.end)).ok()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_call_maps_nothing() {
        assert_eq!(Birth::Bytes(4096).range(1, -12_i64 as u64), None);
        assert_eq!(
            Birth::Bytes(4096).range(1, 0x1000),
            VaRange::covering(Va::new(0x1000), 4096).ok()
        );
    }
}
