//! The layout of the structs in Rust. A test compares this layout with `abi/layout.txt`, and a test
//! in C compares that file with the headers.

/// Defines the lines of `abi/layout.txt` for structs of the module. A field may have another name
/// in C.
macro_rules! layout {
    ($($name:literal = $struct:ty { $($field:ident $(as $in_c:literal)?),* $(,)? })*) => {
        #[cfg(test)]
        pub(crate) fn layout() -> Vec<String> {
            let mut lines = Vec::new();
            $(
                lines.push(format!("size {} {}", $name, size_of::<$struct>()));
                $(
                    let in_c: &[&str] = &[$($in_c,)? stringify!($field)];
                    lines.push(format!("{}.{} {}", $name, in_c[0], std::mem::offset_of!($struct, $field)));
                )*
            )*
            lines
        }
    };
}

pub(crate) use layout;

#[cfg(test)]
mod tests {
    use crate::{interval, notifier, range, regcache, sources, subscription};
    use std::collections::BTreeSet;

    #[test]
    fn the_structs_are_those_of_the_list() {
        let list = include_str!("../abi/layout.txt")
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let layouts = [
            interval::layout(),
            notifier::layout(),
            range::layout(),
            regcache::layout(),
            regcache::layout_of_stats(),
            sources::layout(),
            subscription::layout(),
        ];
        let found: BTreeSet<String> = layouts.concat().into_iter().collect();
        assert_eq!(found, list.map(str::to_owned).collect());
    }
}
