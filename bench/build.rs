//! Builds the C side of the comparisons with liburcu, UCX and libmmun, if their headers and a C
//! compiler are installed.

fn main() {
    println!("cargo::rerun-if-changed=c");
    urcu();
    ucx();
    capi();
}

fn capi() {
    println!("cargo::rustc-check-cfg=cfg(has_capi)");
    println!("cargo::rerun-if-changed=../crates/capi/include");
    let mut build = cc::Build::new();
    build
        .file("c/capi.c")
        .include("../crates/capi/include")
        .opt_level(3)
        .warnings(false)
        .cargo_warnings(false);
    if build.try_compile("capi_loops").is_ok() {
        println!("cargo::rustc-cfg=has_capi");
    }
}

fn urcu() {
    println!("cargo::rustc-check-cfg=cfg(has_urcu)");
    let built = cc::Build::new()
        .files(["c/memb.c", "c/bp.c"])
        // This macro inlines liburcu's readers, as the Rust readers are inlined. The LGPL allows
        // that, because this code is not shipped.
        .define("_LGPL_SOURCE", None)
        .opt_level(3)
        .cargo_warnings(false)
        .try_compile("urcu_peers");
    if built.is_err() {
        println!(
            "cargo::warning=liburcu-dev or a C compiler is missing: the benches of srcu leave liburcu out"
        );
        return;
    }
    println!("cargo::rustc-cfg=has_urcu");
    for library in ["urcu-memb", "urcu-bp", "urcu-common"] {
        println!("cargo::rustc-link-lib={library}");
    }
}

fn ucx() {
    println!("cargo::rustc-check-cfg=cfg(has_ucx)");
    let built = cc::Build::new()
        .file("c/rcache.c")
        .opt_level(3)
        .warnings(false)
        .cargo_warnings(false)
        .try_compile("ucx_peer");
    if built.is_err() {
        println!(
            "cargo::warning=libucx-dev or a C compiler is missing: the bench of regcache leaves UCX out"
        );
        return;
    }
    println!("cargo::rustc-cfg=has_ucx");
    println!("cargo::rustc-link-lib=ucs");
}
