//! One word for each thread, reached without a call.
//!
//! In a library that is loaded by `dlopen`, the standard library's thread-locals are reached by
//! `__tls_get_addr`, which allocates at a thread's first use, and again after later loads. A
//! section may begin inside `malloc`, so it must not allocate.
//!
//! On x86-64 with glibc the words are therefore in the **initial-exec** model: before `dlopen`
//! returns, the loader gives them a place beside each thread's own block, in threads that already
//! run as well. Reading one takes two instructions. Rust has no stable way to ask for that model,
//! so the words are declared in assembly. All such libraries of a process share 1.6 KiB that glibc
//! sets aside, so the words are few.
//!
//! Elsewhere, and under loom and Miri, a word is a thread-local of the standard library.

/// Declares words, one for each thread, with the value that each thread starts with. They have
/// `get`, `set`, `mark` and `add`.
///
/// Not part of the interface of this crate: it is public for the crates above, whose brackets and
/// look-ups begin where sections do.
#[doc(hidden)]
#[macro_export]
macro_rules! thread_word {
    ($($(#[$about:meta])* static $name:ident: u64 = $first:expr;)*) => { $(
        $(#[$about])*
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, reason = "it is used as a static is")]
        #[derive(Debug, Clone, Copy)]
        struct $name;

        #[cfg(all(
            target_arch = "x86_64", target_os = "linux", target_env = "gnu",
            not(any(mmun_loom, miri)),
        ))]
        ::core::arch::global_asm!(
            concat!(".pushsection .tdata.", $crate::thread_word!(@symbol $name), ", \"awT\", @progbits"),
            ".p2align 3",
            concat!(".globl ", $crate::thread_word!(@symbol $name)),
            concat!(".hidden ", $crate::thread_word!(@symbol $name)),
            concat!(".type ", $crate::thread_word!(@symbol $name), ", @object"),
            concat!(".size ", $crate::thread_word!(@symbol $name), ", 8"),
            concat!($crate::thread_word!(@symbol $name), ":"),
            ".quad {first}",
            ".popsection",
            first = const { let first: u64 = $first; first },
        );

        #[cfg(all(
            target_arch = "x86_64", target_os = "linux", target_env = "gnu",
            not(any(mmun_loom, miri)),
        ))]
        #[allow(unsafe_code, reason = "a word in assembly, which nothing else names")]
        const _: () = {
            impl $name {
                /// Where the word is, counted from the thread pointer: the same in all threads.
                #[inline(always)]
                fn offset() -> u64 {
                    let offset;
                    // SAFETY: it loads the offset, which the loader has stored before any code of
                    // this library runs and which never changes.
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
                    // SAFETY: it reads eight bytes of the calling thread, which live as long as
                    // the thread does. `nomem`: no Rust code can reach them, only this block and
                    // that of `set`, which are not `pure` and so stay in order.
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

                /// Adds in one instruction, for a counter on a fast path.
                #[allow(dead_code, reason = "most words are no counters")]
                #[inline(always)]
                fn add<const AMOUNT: i32>(self) {
                    // SAFETY: as in `get`.
                    unsafe {
                        ::core::arch::asm!(
                            "add qword ptr fs:[{offset}], {amount}",
                            offset = in(reg) Self::offset(),
                            amount = const AMOUNT,
                            options(nomem, nostack),
                        );
                    }
                }

                /// Sets it, and keeps the compiler from moving accesses to memory across: for a
                /// mark that says to signal handlers what they have interrupted.
                #[allow(dead_code, reason = "most words are no marks")]
                #[inline(always)]
                fn mark(self, value: u64) {
                    // SAFETY: as in `get`. Without `nomem` the compiler takes it for an access to
                    // any memory.
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
                    // SAFETY: as in `get`.
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

        #[cfg(not(all(
            target_arch = "x86_64", target_os = "linux", target_env = "gnu",
            not(any(mmun_loom, miri)),
        )))]
        const _: () = {
            use ::core::cell::Cell;

            #[cfg(not(mmun_loom))]
            ::std::thread_local! { static WORD: Cell<u64> = const { Cell::new($first) }; }
            #[cfg(mmun_loom)]
            $crate::loom::thread_local! { static WORD: Cell<u64> = Cell::new($first); }

            impl $name {
                fn get(self) -> u64 {
                    WORD.with(Cell::get)
                }

                #[allow(dead_code, reason = "most words are no counters")]
                fn add<const AMOUNT: i32>(self) {
                    self.set(self.get().wrapping_add_signed(AMOUNT.into()));
                }

                #[allow(dead_code, reason = "most words are no marks")]
                fn mark(self, value: u64) {
                    ::core::sync::atomic::compiler_fence(::core::sync::atomic::Ordering::SeqCst);
                    self.set(value);
                    ::core::sync::atomic::compiler_fence(::core::sync::atomic::Ordering::SeqCst);
                }

                fn set(self, value: u64) {
                    WORD.with(|word| word.set(value));
                }
            }
        };
    )* };
    // The word's name in assembly. Two versions of a crate in one program differ in it; the mangled
    // name of an item would too, but the compiler may change that after the assembly was written.
    (@symbol $name:ident) => {
        concat!(
            env!("CARGO_CRATE_NAME"), "_", env!("CARGO_PKG_VERSION_MAJOR"), "_",
            env!("CARGO_PKG_VERSION_MINOR"), "_", env!("CARGO_PKG_VERSION_PATCH"), "_",
            env!("CARGO_PKG_VERSION_PRE"), "_", stringify!($name)
        )
    };
}
