//! The documents that are made from the code, and the check that they still are.

use crate::{Result, cli_docs, config_docs, read};
use std::path::Path;

/// Path and content of every generated document.
fn documents() -> Result<[(&'static str, String); 3]> {
    Ok([
        ("docs/cli.md", cli_docs::markdown()),
        ("docs/config.md", config_docs::markdown()?),
        ("docs/config.schema.json", config_docs::schema()?),
    ])
}

/// Writes them.
pub(crate) fn write(root: &Path) -> Result<()> {
    for (path, content) in documents()? {
        crate::write(&root.join(path), content)?;
        println!("wrote {path}");
    }
    Ok(())
}

/// Fails when one of them is not what the code says.
pub(crate) fn check(root: &Path) -> Result<()> {
    for (path, content) in documents()? {
        let committed = read(&root.join(path))?;
        if committed != content {
            let same = committed.lines().zip(content.lines()).take_while(|(a, b)| a == b).count();
            return Err(format!("{path} is not up to date from line {}: run `cargo xtask docs`", same + 1));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_documents_are_up_to_date() {
        check(&crate::root()).unwrap();
    }

    #[test]
    fn a_stale_document_is_named_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        check(folder.path()).unwrap();
        std::fs::write(folder.path().join("docs/config.md"), "# Configuration\nold\n").unwrap();
        let message = check(folder.path()).unwrap_err();
        assert!(message.contains("docs/config.md") && message.contains("line 2"), "{message}");
        assert!(message.contains("cargo xtask docs"), "{message}");
    }
}
