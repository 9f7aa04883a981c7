//! Fuzzes the reader of BTF, the kernel's description of its types, with and without the BTF of a
//! module. The reader must terminate for every input.
#![no_main]

#[path = "../../crates/mmu-source/src/kernel/btf.rs"]
mod btf;

use libfuzzer_sys::fuzz_target;

/// Adds a header, so that most inputs are valid BTF.
fn file(types: &[u8], names: &[u8]) -> Vec<u8> {
    let [types_length, names_length] = [types, names].map(|bytes| bytes.len() as u32);
    let header = [0x1_eb9f, 24, 0, types_length, types_length, names_length];
    let words = header.iter().flat_map(|word| word.to_le_bytes());
    words
        .chain(types.iter().copied())
        .chain(names.iter().copied())
        .collect()
}

fuzz_target!(|input: (&[u8], &[u8], &[u8], bool)| {
    let (types, names, module, with_header) = input;
    let whole = if with_header {
        file(types, names)
    } else {
        [types, names].concat()
    };
    let over = file(module, names);
    for module in [None, Some(over.as_slice()), Some(module)] {
        if let Some(btf) = btf::Btf::parse(&whole, module) {
            for (name, member) in [("kvm", "mm"), ("a", "b"), ("", ""), ("file", "f_op")] {
                let _ = btf.offset(name, member);
            }
        }
    }
});
