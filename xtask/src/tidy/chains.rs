//! Rejects chains of `let` conditions in libraries and programs. Such a chain needs Rust 1.88, but
//! the crates promise to compile with 1.85. Clippy's `incompatible_msrv` does not find chains,
//! because it checks functions and no syntax.

use super::circles::is_for_tests;
use std::path::{Path, PathBuf};
use syn::visit::{self, Visit};
use syn::{BinOp, Expr, ExprBinary, Item, spanned::Spanned};

pub(super) fn check(sources: &[(PathBuf, String)], complaints: &mut Vec<String>) {
    for (path, text) in sources.iter().filter(|(path, _)| is_promised(path)) {
        let file =
            syn::parse_file(text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut chains = Chains(Vec::new());
        chains.visit_file(&file);
        let complain = |line| {
            format!(
                "{}:{line}: a chain of `let` conditions needs Rust 1.88",
                path.display()
            )
        };
        complaints.extend(chains.0.into_iter().map(complain));
    }
}

/// Tells whether the file must compile with the oldest compiler. Tests, `testkit` and what is
/// outside `crates` need not.
fn is_promised(path: &Path) -> bool {
    path.starts_with("crates")
        && !path.starts_with("crates/testkit")
        && !path.with_extension("").iter().any(|part| part == "tests")
}

/// The lines of the chains.
struct Chains(Vec<usize>);

impl Visit<'_> for Chains {
    fn visit_item(&mut self, item: &Item) {
        if !matches!(item, Item::Mod(module) if module.attrs.iter().any(is_for_tests)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_expr_binary(&mut self, binary: &ExprBinary) {
        let is_let = |side: &Expr| matches!(side, Expr::Let(_));
        if matches!(binary.op, BinOp::And(_)) && (is_let(&binary.left) || is_let(&binary.right)) {
            self.0.push(binary.span().start().line);
        }
        visit::visit_expr_binary(self, binary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(path: &str, condition: &str) -> Vec<String> {
        let text = format!("fn f() {{\n    if {condition} {{}}\n}}\n");
        let mut complaints = Vec::new();
        check(&[(path.into(), text)], &mut complaints);
        complaints
    }

    #[test]
    fn a_chain_is_reported_with_its_line() {
        let told = ["crates/made/src/a.rs:2: a chain of `let` conditions needs Rust 1.88"];
        assert_eq!(
            complaints("crates/made/src/a.rs", "let Some(a) = b && a"),
            told
        );
        assert_eq!(
            complaints("crates/made/src/a.rs", "a && let Some(a) = b"),
            told
        );
    }

    #[test]
    fn other_conditions_and_tests_are_accepted() {
        assert_eq!(complaints("crates/made/src/a.rs", "a && b"), [""; 0]);
        assert_eq!(
            complaints("crates/made/src/a.rs", "let Some(a) = (b && c)"),
            [""; 0]
        );
        assert_eq!(
            complaints("crates/made/tests/it/a.rs", "a && let Some(a) = b"),
            [""; 0]
        );
        assert_eq!(
            complaints("crates/made/src/a/tests.rs", "a && let Some(a) = b"),
            [""; 0]
        );
    }
}
