//! Fields of the kernel's text files in `/proc`, one `name: value` a line.

/// Returns the value of the field `name`.
pub(crate) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim())
}
