//! Compares the prototypes of the headers with the functions in Rust. The test declares each
//! function once more in C, with the signature that it has in Rust. A C compiler rejects a
//! declaration that differs from the header.

use crate::support::{STRICT, compile, root, scratch};
use std::collections::BTreeSet;
use std::fs;

/// Translates a Rust type to C. The file name is needed because two files use one name for
/// different structs.
fn in_c(file: &str, rust: &str) -> String {
    if let Some(pointee) = rust.strip_prefix("*mut ") {
        return format!("{} *", in_c(file, pointee));
    }
    if let Some(pointee) = rust.strip_prefix("*const ") {
        return format!("const {} *", in_c(file, pointee));
    }
    let name = match (file, rust) {
        (_, "c_int") => "int",
        (_, "c_ulong") => "unsigned long",
        (_, "c_char") => "char",
        (_, "c_void") => "void",
        (_, "u32") => "uint32_t",
        (_, "u64") => "uint64_t",
        (_, "usize") => "size_t",
        (_, "bool") => "bool",
        (_, "MmStruct") => "struct mm_struct",
        (_, "MmuNotifier") => "struct mmu_notifier",
        (_, "IntervalNotifier") => "struct mmu_interval_notifier",
        (_, "IntervalOps") => "struct mmu_interval_notifier_ops",
        (_, "Range") => "struct mmu_notifier_range",
        (_, "Mmun") => "struct mmun",
        (_, "Status") => "struct mmun_status",
        (_, "Watched") => "struct mmun_watch",
        (_, "Subscription") => "struct mmun_subscription",
        (_, "Regcache") => "struct mmun_regcache",
        (_, "Functions") => "struct mmun_registrar",
        (_, "Lease") => "struct mmun_lease",
        (_, "Stats") => "struct mmun_regcache_stats",
        ("notifier.rs", "Ops") => "struct mmu_notifier_ops",
        ("subscription.rs", "Ops") => "struct mmun_ops",
        ("sources.rs", "Options") => "struct mmun_options",
        ("regcache.rs", "Options") => "struct mmun_regcache_options",
        _ => panic!("{file}: there is no type {rust} in C"),
    };
    name.to_owned()
}

/// Returns the exported functions of a Rust file, each as its name and its prototype in C.
fn prototypes(file: &str, text: &str) -> Vec<(String, String)> {
    let text = text
        .split("#[cfg(test)]")
        .next()
        .expect("a text has a first part");
    let mut found = Vec::new();
    for at in text.match_indices("    fn mmun_").map(|(at, _)| at) {
        let signature = &text[at + "    fn ".len()..];
        let (name, rest) = signature.split_once('(').expect("arguments");
        let (arguments, rest) = rest.split_once(')').expect("the end of the arguments");
        let (result, _) = rest.split_once('{').expect("a body");
        let result = result
            .trim()
            .strip_prefix("-> ")
            .map_or("void".to_owned(), |result| in_c(file, result.trim()));
        let arguments: Vec<String> = arguments
            .split(',')
            .filter_map(|argument| argument.split_once(": "))
            .map(|(_, rust)| in_c(file, rust.trim()))
            .collect();
        let arguments = if arguments.is_empty() {
            "void".to_owned()
        } else {
            arguments.join(", ")
        };
        found.push((name.to_owned(), format!("{result} {name}({arguments});\n")));
    }
    found
}

#[test]
fn the_headers_declare_what_the_library_defines() {
    let mut functions = Vec::new();
    for entry in fs::read_dir(root().join("src")).expect("the sources are there") {
        let entry = entry.expect("a readable entry");
        let file = entry.file_name().into_string().expect("ASCII");
        functions.extend(prototypes(
            &file,
            &fs::read_to_string(entry.path()).expect("UTF-8"),
        ));
    }
    let symbols = fs::read_to_string(root().join("abi/symbols.txt")).expect("the list is there");
    let symbols: BTreeSet<&str> = symbols
        .lines()
        .filter_map(|line| line.strip_suffix("@@MMUN_0"))
        .collect();
    assert_eq!(
        functions
            .iter()
            .map(|(name, _)| name.as_str())
            .collect::<BTreeSet<_>>(),
        symbols
    );

    let mut program = String::from("#include <mmun/mmu_notifier.h>\n#include <mmun/mmun.h>\n");
    // Uses the type of each function, so the program does not compile if no header declares it.
    for (number, (name, _)) in functions.iter().enumerate() {
        program += &format!("__typeof__({name}) *use_{number};\n");
    }
    functions
        .iter()
        .for_each(|(_, prototype)| program += prototype);
    program += "int main(void) { return 0; }\n";
    let source = scratch("programs").join("prototypes.c");
    fs::write(&source, program).expect("a file below target");
    compile(
        "prototypes",
        "gcc",
        &[&["-std=c11"], STRICT].concat(),
        &[source],
    );
}
