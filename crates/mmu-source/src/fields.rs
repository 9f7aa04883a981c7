//! The kernel's descriptions in `/proc`: lines of the form `name: value`.

/// Returns the value of the line of that name.
pub(crate) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim())
}
