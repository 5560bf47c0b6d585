//! The envelope of a cache file, by which damaged and foreign files are recognised before their content is read.
//!
//! The fields are little-endian, with nothing between them and nothing after the last:
//!
//! | field | type |
//! |---|---|
//! | magic | `"EFCA"` |
//! | format version, 1 | u32 |
//! | length of the key | u64 |
//! | length of the payload | u64 |
//! | key: what the payload is, and for which adapter, driver and version of this crate | UTF-8 |
//! | payload | bytes |
//! | FNV-1a of everything before | u64 |

use crate::fnv::fnv1a;

const MAGIC: [u8; 4] = *b"EFCA";
const VERSION: u32 = 1;
const HEADER: usize = 24;
const CHECKSUM: usize = 8;

/// The file that holds `payload`.
pub(super) fn seal(key: &str, payload: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(HEADER + key.len() + payload.len() + CHECKSUM);
    file.extend(MAGIC);
    file.extend(VERSION.to_le_bytes());
    file.extend((key.len() as u64).to_le_bytes());
    file.extend((payload.len() as u64).to_le_bytes());
    file.extend(key.as_bytes());
    file.extend(payload);
    file.extend(fnv1a(&file).to_le_bytes());
    file
}

/// The payload of a file with this key, or a text that says what is wrong with the file.
pub(super) fn open<'a>(key: &str, file: &'a [u8]) -> Result<&'a [u8], &'static str> {
    let (magic, rest) = file.split_first_chunk().ok_or("it is truncated")?;
    if *magic != MAGIC {
        return Err("it is no cache file");
    }
    let (version, rest) = rest.split_first_chunk().ok_or("it is truncated")?;
    match u32::from_le_bytes(*version) {
        VERSION => {}
        newer if newer > VERSION => {
            return Err("a newer version of energyflow wrote it; update energyflow to use it");
        }
        _ => return Err("it has no valid format version"),
    }
    let (key_bytes, rest) = rest.split_first_chunk().ok_or("it is truncated")?;
    let (payload_bytes, rest) = rest.split_first_chunk().ok_or("it is truncated")?;
    let lengths = [*key_bytes, *payload_bytes].map(u64::from_le_bytes);
    let (content, checksum) = rest.split_last_chunk().ok_or("it is truncated")?;
    if lengths[0].checked_add(lengths[1]) != Some(content.len() as u64) {
        return Err("its length is not the one it states");
    }
    if fnv1a(&file[..file.len() - CHECKSUM]) != u64::from_le_bytes(*checksum) {
        return Err("its checksum does not fit");
    }
    // Not longer than the content, hence a usize.
    let (found, payload) = content.split_at(lengths[0] as usize);
    if found != key.as_bytes() {
        return Err("it was made for another adapter, driver or version");
    }
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "pipelines\nadapter\nvulkan\ndriver 1.2\n0.1.0";

    #[test]
    fn what_is_sealed_is_found() {
        for payload in [&b""[..], b"x", &[0xff; 1000]] {
            assert_eq!(open(KEY, &seal(KEY, payload)), Ok(payload));
        }
        assert_eq!(open("", &seal("", b"x")), Ok(&b"x"[..]));
    }

    #[test]
    fn every_prefix_and_every_extension_is_refused() {
        let file = seal(KEY, b"payload");
        for length in 0..file.len() {
            assert!(open(KEY, &file[..length]).is_err(), "{length} bytes");
        }
        let longer = [file.as_slice(), &[0]].concat();
        assert!(open(KEY, &longer).is_err());
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let file = seal(KEY, b"payload");
        for bit in 0..8 * file.len() {
            let mut damaged = file.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(open(KEY, &damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let mut file = seal(KEY, b"payload");
        file[4..8].copy_from_slice(&(VERSION + 1).to_le_bytes());
        let reason = open(KEY, &file).unwrap_err();
        assert!(reason.contains("newer"), "{reason}");
        file[4..8].copy_from_slice(&0_u32.to_le_bytes());
        let reason = open(KEY, &file).unwrap_err();
        assert!(reason.contains("no valid"), "{reason}");
    }

    #[test]
    fn another_key_is_refused() {
        let file = seal(KEY, b"payload");
        for other in [
            "",
            "pipelines",
            &KEY.replace("1.2", "1.3"),
            &format!("{KEY}p"),
        ] {
            assert!(open(other, &file).is_err(), "{other:?}");
        }
    }

    /// Lengths that overflow when they are added up, in a file with the right checksum.
    #[test]
    fn absurd_lengths_are_refused() {
        let mut file = seal(KEY, b"payload");
        for lengths in [[u64::MAX, 1], [1, u64::MAX], [u64::MAX; 2], [1 << 62; 2]] {
            file[8..16].copy_from_slice(&lengths[0].to_le_bytes());
            file[16..24].copy_from_slice(&lengths[1].to_le_bytes());
            let end = file.len() - CHECKSUM;
            let checksum = fnv1a(&file[..end]).to_le_bytes();
            file[end..].copy_from_slice(&checksum);
            assert!(open(KEY, &file).is_err(), "{lengths:?}");
        }
    }
}
