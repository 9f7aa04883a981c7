//! Thread-local words that are accessed without a function call.
//!
//! In a library that is loaded by `dlopen`, code accesses the standard library's thread-locals
//! through `__tls_get_addr`. That function allocates at a thread's first use, and again after later
//! loads. A section may begin inside `malloc`, so it must not allocate.
//!
//! So on x86-64 and aarch64 with glibc the words use the **initial-exec** model. Before `dlopen`
//! returns, the loader reserves their place in every thread's static block, even in running
//! threads. Reading a word takes two instructions, on aarch64 four. Rust has no stable way to
//! request that model, so the words are declared in assembly. All such libraries of a process share
//! a surplus of 1.6 KiB that glibc reserves, so there are only few words.
//!
//! For each of the two architectures, a file has a macro with the instructions.
//!
//! On other platforms, and under loom and Miri, a word is a thread-local of the standard library.

#[cfg(all(
    target_arch = "aarch64",
    target_os = "linux",
    target_env = "gnu",
    not(any(mmun_loom, miri))
))]
#[path = "word/aarch64.rs"]
mod machine;
#[cfg(all(
    target_arch = "x86_64",
    target_os = "linux",
    target_env = "gnu",
    not(any(mmun_loom, miri))
))]
#[path = "word/x86_64.rs"]
mod machine;

/// Declares thread-local words with their initial values. The words have the methods `get`, `set`,
/// `mark` and `add`.
///
/// This macro is not part of the interface of this crate. It is public for the crates that build on
/// this one: their brackets and look-ups may begin inside `malloc`, as sections may.
#[doc(hidden)]
#[macro_export]
macro_rules! thread_word {
    ($($(#[$about:meta])* static $name:ident: u64 = $first:expr;)*) => { $(
        $(#[$about])*
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, reason = "it is used as a static is")]
        #[derive(Debug, Clone, Copy)]
        struct $name;

        #[cfg(all(
            any(target_arch = "x86_64", target_arch = "aarch64"), target_os = "linux", target_env = "gnu",
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
            any(target_arch = "x86_64", target_arch = "aarch64"), target_os = "linux", target_env = "gnu",
            not(any(mmun_loom, miri)),
        ))]
        $crate::thread_word_access!($name);

        #[cfg(not(all(
            any(target_arch = "x86_64", target_arch = "aarch64"), target_os = "linux", target_env = "gnu",
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
    // The word's name in assembly. The name contains the version, so two versions of a crate in one
    // program have different names. The mangled name of an item would be different, too, but the
    // compiler may change a mangled name after the assembly was written.
    (@symbol $name:ident) => {
        concat!(
            env!("CARGO_CRATE_NAME"), "_", env!("CARGO_PKG_VERSION_MAJOR"), "_",
            env!("CARGO_PKG_VERSION_MINOR"), "_", env!("CARGO_PKG_VERSION_PATCH"), "_",
            env!("CARGO_PKG_VERSION_PRE"), "_", stringify!($name)
        )
    };
}
