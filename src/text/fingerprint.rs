//! What tells whether files have changed.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;

use crate::error::{Error, Result};
use crate::fnv::Fnv;

/// A hash (FNV-1a) of the contents of files, in their order, as 16 hexadecimal digits. A missing file counts as an empty one. It tells files
/// that have changed from files that have not; it is no protection against somebody who wants two to look alike.
///
/// # Errors
/// [`Error::Io`] for a file that cannot be read.
pub fn fingerprint(paths: &[impl AsRef<Path>]) -> Result<String> {
    let mut hash = Fnv::new();
    for path in paths {
        let path = path.as_ref();
        let fail = |error| Error::io(path, error);
        let mut length = 0_u64;
        let mut reader = match File::open(path) {
            Ok(file) => Some(BufReader::with_capacity(1 << 20, file)),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(fail(error)),
        };
        while let Some(reader) = &mut reader {
            let bytes = reader.fill_buf().map_err(fail)?;
            if bytes.is_empty() {
                break;
            }
            hash = hash.write(bytes);
            let read = bytes.len();
            length += read as u64;
            reader.consume(read);
        }
        // So that what moves from one file to the next makes a difference.
        hash = hash.write(&length.to_le_bytes());
    }
    Ok(format!("{:016x}", hash.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
        let now = || fingerprint(&[&a, &b]).unwrap();
        let mut seen = vec![now()];
        for (first, second) in [("x", ""), ("", "x"), ("xy", ""), ("x", "y"), ("y", "x")] {
            std::fs::write(&a, first).unwrap();
            std::fs::write(&b, second).unwrap();
            seen.push(now());
        }
        assert_eq!(seen.last(), Some(&now()));
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 6);
        assert!(fingerprint(&[folder.path()]).is_err(), "a folder");
    }
}
