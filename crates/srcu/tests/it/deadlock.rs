//! A thread that would wait for itself gets an error and does not hang.

use srcu::{Srcu, WouldDeadlock};
use std::sync::{Arc, mpsc::channel};

#[test]
fn waiting_inside_ones_own_section_is_refused() {
    let srcu = Srcu::new();
    let outer = srcu.read_lock();
    let inner = srcu.read_lock();
    drop(outer);
    assert_eq!(srcu.synchronize(), Err(WouldDeadlock));
    assert_eq!(srcu.synchronize_expedited(), Err(WouldDeadlock));
    assert_eq!(srcu.barrier(), Err(WouldDeadlock));
    assert_eq!(srcu.drain_until_idle(), Err(WouldDeadlock));
    drop(inner);
    assert_eq!(srcu.synchronize(), Ok(()));
    assert_eq!(srcu.barrier(), Ok(()));
}

#[test]
fn waiting_in_a_callback_is_refused() {
    let (srcu, other) = (Arc::new(Srcu::new()), Arc::new(Srcu::new()));
    let (send, answers) = channel();
    let (own, another) = (Arc::clone(&srcu), Arc::clone(&other));
    srcu.call(move || {
        let own = [own.synchronize(), own.barrier(), own.drain_until_idle()];
        let others = [another.barrier(), another.drain_until_idle()];
        let allowed = another.synchronize();
        send.send((own, others, allowed)).unwrap();
    });
    let (own, others, allowed) = answers.recv().unwrap();
    assert_eq!(own, [Err(WouldDeadlock); 3]);
    assert_eq!(
        others,
        [Err(WouldDeadlock); 2],
        "one thread runs the callbacks of all domains"
    );
    assert_eq!(allowed, Ok(()), "nothing of the other domain runs here");
    drop(other);
}

#[test]
fn a_callback_may_read_call_and_ask_for_a_grace_period() {
    let srcu = Arc::new(Srcu::new());
    let (send, cookies) = channel();
    let inner = Arc::clone(&srcu);
    srcu.call(move || {
        let section = inner.read_lock();
        inner.call(|| ());
        send.send(inner.start_poll()).unwrap();
        drop(section);
    });
    let cookie = cookies.recv().unwrap();
    srcu.drain_until_idle().unwrap();
    assert!(srcu.poll(cookie) || srcu.synchronize().is_ok() && srcu.poll(cookie));
}

#[test]
fn the_message_says_what_to_do() {
    let message = WouldDeadlock.to_string();
    assert!(
        message.contains("end the section or use another thread"),
        "{message}"
    );
    assert!(!message.contains('\n'));
}
