//! Tests with real verbs. `cargo xtask guest` runs them, on soft-RoCE.

#[cfg(feature = "verbs")]
#[path = "../../examples/endpoint/mod.rs"]
mod endpoint;
#[cfg(feature = "verbs")]
mod figures;
#[cfg(feature = "verbs")]
mod limits;
#[cfg(feature = "verbs")]
mod memory;
#[cfg(feature = "verbs")]
mod peers;
#[cfg(feature = "verbs")]
mod removal;
#[cfg(feature = "verbs")]
mod stale;
#[cfg(feature = "verbs")]
mod torture;
#[cfg(feature = "verbs")]
mod two_programs;

#[cfg(not(feature = "verbs"))]
#[test]
fn verbs() {
    println!("SKIP verbs: built without the feature `verbs`, which needs cmake and libclang");
}
