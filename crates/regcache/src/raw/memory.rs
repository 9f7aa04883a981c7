//! Large arrays that start as zeroes, of which the kernel backs only what is touched.

/// Types for which all bits zero is a value.
///
/// # Safety
/// That must be so.
pub(crate) unsafe trait Zero {
    /// The same value, for models, whose atomics are not plain memory.
    #[cfg_attr(not(mmun_loom), expect(dead_code, reason = "models only"))]
    fn zero() -> Self;
}

// SAFETY: An integer.
unsafe impl Zero for u32 {
    fn zero() -> Self {
        0
    }
}

/// Returns `len` zeroes.
#[cfg(not(mmun_loom))]
pub(crate) fn zeroes<T: Zero>(len: usize) -> Box<[T]> {
    let zeroes = Box::new_zeroed_slice(len);
    // SAFETY: The elements must be valid: their type says that zeroes are.
    unsafe { zeroes.assume_init() }
}

#[cfg(mmun_loom)]
pub(crate) fn zeroes<T: Zero>(len: usize) -> Box<[T]> {
    (0..len).map(|_| T::zero()).collect()
}
