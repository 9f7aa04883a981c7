//! Each header compiles alone, and together with the other headers.

use crate::support::{STRICT, compile, root, scratch};
use std::fs;

fn every_header(names: &[&str]) -> String {
    names
        .iter()
        .map(|name| format!("#include <mmun/{name}>\n"))
        .collect::<String>()
        + "int main(void) { return 0; }\n"
}

fn headers() -> Vec<String> {
    let entries = fs::read_dir(root().join("include/mmun")).expect("the headers are there");
    entries
        .map(|entry| {
            entry
                .expect("a readable entry")
                .file_name()
                .into_string()
                .expect("ASCII")
        })
        .collect()
}

#[test]
fn each_header_is_clean_by_itself_and_with_the_others() {
    let all = headers();
    let in_c: Vec<&str> = all
        .iter()
        .map(String::as_str)
        .filter(|name| name.ends_with(".h"))
        .collect();
    let in_cpp: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut sets: Vec<(&str, Vec<&str>)> = vec![("c", in_c.clone()), ("cpp", in_cpp.clone())];
    sets.extend(in_c.iter().map(|name| ("c", vec![*name])));
    sets.extend(in_cpp.iter().map(|name| ("cpp", vec![*name])));
    for (number, (language, names)) in sets.into_iter().enumerate() {
        let source = scratch("headers").join(format!("{number}.{language}"));
        fs::write(&source, every_header(&names)).expect("a file below target");
        let (compiler, standard) = if language == "c" {
            ("gcc", "-std=c99")
        } else {
            ("g++", "-std=c++11")
        };
        if compile(
            &format!("header-{number}"),
            compiler,
            &[&[standard], STRICT].concat(),
            &[source],
        )
        .is_none()
        {
            return;
        }
    }
}
