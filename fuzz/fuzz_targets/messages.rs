//! Fuzzes the parser of the broker's messages. If bytes parse as a message, they must be the
//! canonical form of that message.
#![no_main]
#![allow(dead_code, reason = "the file has more than the parsers")]

#[path = "../../crates/mmu-source/src/kernel/broker/message.rs"]
mod message;

use libfuzzer_sys::fuzz_target;
use message::{Reply, Request};

fuzz_target!(|packet: &[u8]| {
    if let Some(request) = Request::parse(packet) {
        assert_eq!(request.bytes(), packet);
        assert!(request.descriptors() <= 1);
    }
    if let Some(reply) = Reply::parse(packet) {
        assert_eq!(reply.bytes(), packet);
        // A refusal prints as one line without control characters.
        if let Reply::Refused(refusal) = reply {
            assert!(
                refusal
                    .to_string()
                    .chars()
                    .all(|character| !character.is_control())
            );
        }
    }
});
