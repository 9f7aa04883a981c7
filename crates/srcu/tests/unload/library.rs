//! A library that queues a callback, which starts the background thread.

use srcu::Srcu;

#[unsafe(no_mangle)]
extern "C" fn run() {
    let srcu = Srcu::new();
    srcu.call(|| ());
    srcu.barrier().expect("no callback calls this");
}
