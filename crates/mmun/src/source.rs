//! The event sources by name.

use clap::ValueEnum;
use mmu_source::{SOURCES, SourceInfo};

/// An event source, in the order of [`SOURCES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Source {
    Kernel,
    Hook,
    Uffd,
    Process,
}

impl Source {
    pub(crate) const ALL: [Source; 4] =
        [Source::Kernel, Source::Hook, Source::Uffd, Source::Process];

    /// The library's description of the source.
    pub(crate) fn info(self) -> &'static SourceInfo {
        &SOURCES[self as usize]
    }

    pub(crate) fn name(self) -> &'static str {
        self.info().name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_are_the_sources_of_the_library() {
        let names: Vec<&str> = SOURCES.iter().map(|info| info.name).collect();
        assert_eq!(Source::ALL.map(Source::name), *names);
        for source in Source::ALL {
            assert_eq!(
                source
                    .to_possible_value()
                    .expect("it is not hidden")
                    .get_name(),
                source.name()
            );
        }
    }
}
