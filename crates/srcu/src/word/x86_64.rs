//! Access to a thread's word on x86-64.

/// Implements access to a word that [`thread_word`](crate::thread_word) has declared.
#[doc(hidden)]
#[macro_export]
macro_rules! thread_word_access {
    ($name:ident) => {
        #[allow(unsafe_code, reason = "a word in assembly, which nothing else names")]
        const _: () = {
            impl $name {
                /// Returns the offset of the word from the thread pointer, which is the same in all
                /// threads.
                #[inline(always)]
                fn offset() -> u64 {
                    let offset;
                    // SAFETY: loads the offset, which the loader has stored before any code of this
                    // library runs, and which never changes.
                    unsafe {
                        ::core::arch::asm!(
                            concat!(
                                "mov {offset}, qword ptr [rip + ",
                                $crate::thread_word!(@symbol $name),
                                "@GOTTPOFF]"
                            ),
                            offset = out(reg) offset,
                            options(pure, nomem, nostack, preserves_flags),
                        );
                    }
                    offset
                }

                #[inline(always)]
                fn get(self) -> u64 {
                    let value;
                    // SAFETY: reads eight bytes of the calling thread, which live as long as the
                    // thread. `nomem` is correct: only this block and the other blocks of this
                    // `impl` that are not `pure` access them, and such blocks stay in order.
                    unsafe {
                        ::core::arch::asm!(
                            "mov {value}, qword ptr fs:[{offset}]",
                            value = out(reg) value,
                            offset = in(reg) Self::offset(),
                            options(nomem, nostack, preserves_flags),
                        );
                    }
                    value
                }

                /// Adds to the word in one instruction, for a counter on a fast path.
                #[allow(dead_code, reason = "most words are no counters")]
                #[inline(always)]
                fn add<const AMOUNT: i32>(self) {
                    // SAFETY: writes the same eight bytes that `get` reads; the same facts hold.
                    unsafe {
                        ::core::arch::asm!(
                            "add qword ptr fs:[{offset}], {amount}",
                            offset = in(reg) Self::offset(),
                            amount = const AMOUNT,
                            options(nomem, nostack),
                        );
                    }
                }

                /// Sets the word, and keeps the compiler from moving memory accesses across the
                /// store. For a mark that tells a signal handler which code it has interrupted.
                #[allow(dead_code, reason = "most words are no marks")]
                #[inline(always)]
                fn mark(self, value: u64) {
                    // SAFETY: as in `get`. Without `nomem` the compiler assumes an access to any
                    // memory.
                    unsafe {
                        ::core::arch::asm!(
                            "mov qword ptr fs:[{offset}], {value}",
                            value = in(reg) value,
                            offset = in(reg) Self::offset(),
                            options(nostack, preserves_flags),
                        );
                    }
                }

                #[allow(dead_code, reason = "some words are only marks")]
                #[inline(always)]
                fn set(self, value: u64) {
                    // SAFETY: writes the same eight bytes that `get` reads; the same facts hold.
                    unsafe {
                        ::core::arch::asm!(
                            "mov qword ptr fs:[{offset}], {value}",
                            value = in(reg) value,
                            offset = in(reg) Self::offset(),
                            options(nomem, nostack, preserves_flags),
                        );
                    }
                }
            }
        };
    };
}
