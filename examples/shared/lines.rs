//! The lines of a text file or of stdin, some at a time.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// Lines of UTF-8, without what ends them.
pub struct Lines {
    name: String,
    reader: Box<dyn BufRead>,
    read: usize,
}

impl Lines {
    /// Opens a file, or stdin for `-`.
    pub fn open(path: &Path) -> Result<Self, String> {
        let stdin = path == Path::new("-");
        let name = match stdin {
            true => "stdin".to_owned(),
            false => path.display().to_string(),
        };
        let reader: Box<dyn BufRead> = match stdin {
            true => Box::new(std::io::stdin().lock()),
            false => {
                let file = File::open(path).map_err(|error| format!("{name}: {error}"))?;
                Box::new(BufReader::with_capacity(1 << 20, file))
            }
        };
        Ok(Self {
            name,
            reader,
            read: 0,
        })
    }

    /// The next lines, at most so many; none at the end.
    pub fn next_lines(&mut self, most: usize) -> Result<Vec<String>, String> {
        let mut lines = Vec::new();
        while lines.len() < most {
            let mut line = Vec::new();
            let read = self.reader.read_until(b'\n', &mut line);
            if read.map_err(|error| format!("{}: {error}", self.name))? == 0 {
                break;
            }
            self.read += 1;
            for end in *b"\n\r" {
                if line.last() == Some(&end) {
                    line.pop();
                }
            }
            let mut line = String::from_utf8(line).map_err(|error| {
                let at = error.utf8_error().valid_up_to();
                format!(
                    "{}: line {}: not UTF-8 from byte {at} on",
                    self.name, self.read
                )
            })?;
            if self.read == 1 && line.starts_with('\u{feff}') {
                line.remove(0);
            }
            lines.push(line);
        }
        Ok(lines)
    }
}
