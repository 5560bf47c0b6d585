//! EFB2: its layout, its flags, what is refused.

use energyflow::text::{Efb2Writer, Records};

use super::*;

/// Three samples with tokens, texts or both.
fn write(path: &Path, tokens: bool, text: bool) -> Vec<u8> {
    let mut writer = Efb2Writer::create(path, 2).unwrap();
    for (ids, mask, target, words) in samples() {
        let ids = tokens.then_some((&*ids, &*mask));
        let words = text.then_some(&*words);
        writer.push(words, ids, &target).unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn the_layout_is_the_documented_one() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a");
    let header = |flags| {
        let mut bytes = b"EFB2".to_vec();
        bytes.extend([1, 0, 0, 0, 2, 0, 0, 0, flags, 0, 0, 0]);
        bytes
    };
    let text: &[u8] = &[3, 0, 0, 0, b'a', 0xc3, 0xa9];
    let tokens: &[u8] = &[2, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0, 1, 0];
    let target: &[u8] = &[0, 0, 0x80, 0x3f, 0, 0, 0, 0];
    for (with_tokens, with_text) in [(true, false), (false, true), (true, true)] {
        let mut writer = Efb2Writer::create(&path, 2).unwrap();
        let ids = with_tokens.then_some((&[258, 3][..], &[1, 0][..]));
        let words = with_text.then_some("aé");
        writer.push(words, ids, &[1.0, 0.0]).unwrap();
        writer.finish().unwrap();
        let mut expected = header(4 | u8::from(with_tokens) | u8::from(with_text) << 1);
        expected.extend(text.iter().filter(|_| with_text));
        expected.extend(tokens.iter().filter(|_| with_tokens));
        expected.extend(target);
        assert_eq!(std::fs::read(&path).unwrap(), expected);
    }
}

#[test]
fn round_trips_are_exact() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a");
    write(&path, true, true);
    assert_eq!(read(&Dataset::open(&path).unwrap()), samples());
    write(&path, true, false);
    let mut expected = samples();
    for sample in &mut expected {
        sample.3 = "-".into();
    }
    assert_eq!(read(&Dataset::open(&path).unwrap()), expected);
}

#[test]
fn texts_alone_are_tokenised() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a");
    let bytes = write(&path, false, true);
    let (offset, reason) = refusal(&folder, &bytes, None);
    assert!(
        offset == 16 && reason.contains("needs a tokenizer"),
        "{offset} {reason}"
    );
    let tokenizer = Whitespace::new(["drei", "✓"], 8).unwrap();
    for in_memory in [0, 1 << 20] {
        let options = OpenOptions::default().tokenizer(&tokenizer);
        let dataset = Dataset::open_with(&path, options.in_memory(in_memory)).unwrap();
        let expected: Vec<Owned> = samples()
            .into_iter()
            .map(|(_, _, target, text)| {
                let ids = tokenizer.encode(&text).unwrap();
                (ids.clone(), vec![1; ids.len()], target, text)
            })
            .collect();
        assert_eq!(read(&dataset), expected);
    }
    // Without a tokenizer they are still records.
    let records: Result<Vec<_>, _> = Records::open(&path).unwrap().collect();
    let records = records.unwrap();
    assert_eq!(records[2].text.as_deref(), Some("ört ✓"));
    assert_eq!(
        (&records[2].input_ids, records[2].target[1]),
        (&None, 65504.0)
    );
}

#[test]
fn lying_fields_are_refused() {
    let folder = TempDir::new().unwrap();
    let bytes = write(&folder.path().join("a"), true, true);
    // The first sample: text length at 16, text at 20, length at 24, ids at 28, mask at 40, target at 43; the second at 51.
    let max = u32::MAX.to_le_bytes();
    let cases: [(usize, &[u8], u64, &str); 15] = [
        (4, &[0; 4], 4, "samples is zero"),
        (4, &max, 4, "take at least"),
        (8, &max, 4, "take at least"),
        (8, &[0; 4], 8, "width of the targets is zero"),
        (12, &[11], 12, "unknown bits"),
        (12, &[3, 0, 0, 0x80], 12, "0x80000003"),
        (12, &[0], 12, "neither tokens nor texts"),
        (12, &[4], 12, "neither tokens nor texts"),
        (12, &[7], 43, "the file is called normalised"),
        (16, &max, 20, "the file ends"),
        (21, &[0xff], 21, "UTF-8"),
        (24, &[0; 4], 24, "length of a sample is zero"),
        (24, &max, 28, "the file ends"),
        (41, &[2], 41, "mask byte is 2"),
        (43, &f32::NAN.to_le_bytes(), 43, "not finite"),
    ];
    for (at, new, offset, word) in cases {
        let (found, reason) = refusal(&folder, &patched(&bytes, at, new), None);
        assert!(reason.contains(word), "{at}: {reason}");
        assert_eq!(found, offset, "{at}: {reason}");
    }
    for length in 0..bytes.len() {
        let (offset, _) = refusal(&folder, &bytes[..length], None);
        assert!(offset <= length as u64);
    }
    let (offset, reason) = refusal(&folder, &[&bytes[..], &[0]].concat(), None);
    assert!(
        offset == bytes.len() as u64 && reason.contains("1 bytes follow"),
        "{reason}"
    );
    let (offset, _) = refusal(&folder, &bytes, Some(99));
    assert_eq!(offset, 51 + 8, "id 99");
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a");
    let mut writer = Efb2Writer::create(&path, 1).unwrap();
    let tokens: Option<(&[u32], &[u8])> = Some((&[1], &[1]));
    let refused = |result: Result<(), Error>, word: &str| match result {
        Err(Error::Data { reason, .. }) => assert!(reason.contains(word), "{reason}"),
        other => panic!("{word}: {other:?}"),
    };
    refused(writer.push(None, None, &[1.0]), "neither tokens nor text");
    refused(writer.push(Some(""), Some((&[], &[])), &[1.0]), "no tokens");
    refused(
        writer.push(Some(""), tokens, &[1.0, 2.0]),
        "2 values instead of 1",
    );
    refused(
        writer.push(Some(""), tokens, &[f32::INFINITY]),
        "not finite",
    );
    writer.push(Some(""), tokens, &[0.5]).unwrap();
    refused(writer.push(None, tokens, &[1.0]), "a text, or none");
    refused(writer.push(Some(""), None, &[1.0]), "a text, or none");
    writer.finish().unwrap();
    assert_eq!(
        std::fs::read(&path).unwrap()[12],
        3,
        "0.5 is not normalised"
    );
    refused(Efb2Writer::create(&path, 1).unwrap().finish(), "0 samples");
    refused(Efb2Writer::create(&path, 0).map(drop), "0 values");
}
