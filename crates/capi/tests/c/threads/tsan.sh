#!/bin/sh
# Runs threads.c under the thread sanitizer: tsan.sh MILLISECONDS. With --probe the script only
# checks whether this machine has the tools.
#
# The script builds the program, the library and the standard library with the sanitizer. Without an
# instrumented standard library the sanitizer does not see the waits of a contended lock, and
# reports races on the data that the lock protects.
set -eu
sysroot=$(rustc +nightly --print sysroot)
target=$(rustc +nightly -vV | sed -n 's/^host: //p')
runtime=$(ls "$sysroot/lib/rustlib/$target/lib"/librustc*rt.tsan.a)
[ -e "$sysroot/lib/rustlib/src/rust/library/Cargo.lock" ] || {
    echo 'the sources of the standard library are missing: rustup component add rust-src --toolchain nightly' >&2
    exit 1
}
gcc --version >/dev/null
[ "$1" != --probe ] || exit 0

cd "$(dirname "$0")/../../../../.."
folder="target-tsan/std"
RUSTFLAGS='-Zsanitizer=thread --cfg mmun_tsan' \
    cargo +nightly build --locked -Zbuild-std=std --release --target-dir $folder --target "$target" -p mmun-capi
gcc -std=gnu11 -g -O1 -fsanitize=thread -I crates/capi/include -c crates/capi/tests/c/threads/threads.c -o $folder/threads.o
gcc -o $folder/threads $folder/threads.o "$folder/$target/release/libmmun.a" \
    -Wl,--whole-archive "$runtime" -Wl,--no-whole-archive -lpthread -ldl -lm -lrt
# The sanitizer's shadow memory expects the program's addresses without randomisation.
TSAN_OPTIONS='halt_on_error=1 suppressions=stress/tsan.supp' setarch -R $folder/threads "$1"
