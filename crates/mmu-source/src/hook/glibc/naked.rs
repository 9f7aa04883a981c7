//! Functions that are assembly from the first instruction to the last.

/// Defines a function that consists of exactly these instructions. The compiler adds no prologue or
/// epilogue.
///
/// The symbol is hidden from other objects. The symbol's name contains the version, because a
/// program may contain two versions of this crate.
macro_rules! naked {
    ($visibility:vis fn $name:ident($($argument:ident: $type:ty),*), $symbol:expr, [$($code:expr),* $(,)?] $($operands:tt)*) => {
        unsafe extern "C" {
            #[link_name = concat!("mmu_source_", env!("CARGO_PKG_VERSION"), "_", $symbol)]
            $visibility fn $name($($argument: $type),*);
        }

        ::std::arch::global_asm!(
            ".pushsection .text.mmu_source, \"ax\", @progbits",
            ".balign 16",
            concat!(".globl \"mmu_source_", env!("CARGO_PKG_VERSION"), "_", $symbol, "\""),
            concat!(".hidden \"mmu_source_", env!("CARGO_PKG_VERSION"), "_", $symbol, "\""),
            concat!(".type \"mmu_source_", env!("CARGO_PKG_VERSION"), "_", $symbol, "\", %function"),
            concat!("\"mmu_source_", env!("CARGO_PKG_VERSION"), "_", $symbol, "\":"),
            $($code,)*
            ".popsection"
            $($operands)*
        );
    };
}
