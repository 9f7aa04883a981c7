//! Strings, each stored once and referred to by its index.

use std::collections::HashMap;
use std::sync::Arc;

/// The index of a string in a [`Names`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Name(u32);

impl Name {
    pub(crate) fn index(self) -> u32 {
        self.0
    }
}

/// Distinct strings, in the order in which they were added.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    numbers: HashMap<Arc<str>, Name>,
    list: Vec<Arc<str>>,
}

impl Names {
    pub(crate) fn number(&mut self, text: &str) -> Name {
        if let Some(name) = self.numbers.get(text) {
            return *name;
        }
        let name = Name(self.list.len() as u32);
        let text: Arc<str> = text.into();
        self.numbers.insert(Arc::clone(&text), name);
        self.list.push(text);
        name
    }

    /// All strings, in the order of their indices.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(|text| &**text)
    }

    pub(crate) fn text(&self, name: Name) -> &str {
        &self.list[name.0 as usize]
    }
}
