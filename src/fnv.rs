//! The hash FNV-1a, 64 bits. Unlike the hashes of the standard library it is the same in every version and on every platform.

pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    Fnv::new().write(bytes).finish()
}

/// A hash of bytes that come in parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fnv(u64);

impl Fnv {
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    #[must_use]
    pub fn write(self, bytes: &[u8]) -> Self {
        Self(bytes.iter().fold(self.0, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        }))
    }

    pub fn finish(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values from the authors' test suite. Streams of random numbers and files on disk depend on the hash.
    #[test]
    fn known_values() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
        let parts = Fnv::new().write(b"foo").write(b"").write(b"bar");
        assert_eq!(parts.finish(), fnv1a(b"foobar"));
    }
}
