//! Shows the devices of `coverage --library` to the dynamic linker.
//!
//! libfabric's verbs provider calls libibverbs by name, and UCX's libucp calls libuct. The program
//! stands in front of all libraries, so its own functions are found first, if they are in its
//! dynamic symbol table.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for names in ["ibv_*", "rdma_*", "efadv_*", "uct_md_*"] {
        println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol={names}");
    }
}
