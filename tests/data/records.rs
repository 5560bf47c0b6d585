//! Every format to every other.

use energyflow::text::{DatasetFormat, Record, RecordWriter, Records};

use super::*;

const FORMATS: [(DatasetFormat, &str); 5] = [
    (DatasetFormat::Safetensors, "safetensors"),
    (DatasetFormat::Efb1, "efb"),
    (DatasetFormat::Efb2, "efb2"),
    (DatasetFormat::JsonLines, "jsonl"),
    (DatasetFormat::Text, "txt"),
];

fn all(path: &Path) -> Vec<Record> {
    let records: Result<Vec<_>, _> = Records::open(path).unwrap().collect();
    records.unwrap()
}

fn write(path: &Path, format: DatasetFormat, records: &[Record]) -> Result<(), Error> {
    let width = records[0].target.len();
    let mut writer = RecordWriter::create(path, format, width, EmbeddingType::F32)?;
    for record in records {
        writer.push(record)?;
    }
    writer.finish()
}

fn records(tokens: bool, text: bool) -> Vec<Record> {
    let records = samples().into_iter().map(|(ids, mask, target, words)| {
        let mut record = Record::new(target);
        let masked = mask.contains(&0);
        record.input_ids = tokens.then_some(ids);
        record.attention_mask = (tokens && masked).then_some(mask);
        record.text = text.then_some(words);
        record
    });
    records.collect()
}

/// What a format keeps.
fn kept(format: DatasetFormat, records: &[Record]) -> Vec<Record> {
    let mut records = records.to_vec();
    for record in &mut records {
        match format {
            DatasetFormat::Efb1 => record.text = None,
            DatasetFormat::Text => (record.input_ids, record.attention_mask) = (None, None),
            _ => {}
        }
    }
    records
}

#[test]
fn endings_tell_formats() {
    for (format, ending) in FORMATS {
        let path = Path::new("a").with_extension(ending);
        assert_eq!(DatasetFormat::of_path(&path), Some(format));
    }
    assert!(DatasetFormat::ALL.len() == FORMATS.len());
    assert_eq!(DatasetFormat::of_path(Path::new("a.bin")), None);
    assert_eq!(DatasetFormat::of_path(Path::new(".efb")), None);
}

#[test]
fn every_format_is_converted_to_every_other() {
    let folder = TempDir::new().unwrap();
    let (tokens, text) = (records(true, false), records(false, true));
    for records in [records(true, true), tokens, text] {
        for (from, ending) in FORMATS {
            let path = folder.path().join("from").with_extension(ending);
            let written = write(&path, from, &records);
            let lacks = (from.needs_tokens() && records[0].input_ids.is_none())
                || (from == DatasetFormat::Text && records[0].text.is_none());
            if lacks {
                assert!(
                    matches!(written, Err(Error::Data { .. })),
                    "{from} {written:?}"
                );
                continue;
            }
            written.unwrap();
            let read = all(&path);
            assert_eq!(read, kept(from, &records), "{from}");
            for (to, ending) in FORMATS {
                let folder = TempDir::new().unwrap();
                let other = folder.path().join("to").with_extension(ending);
                if write(&other, to, &read).is_ok() {
                    assert_eq!(all(&other), kept(to, &read), "{from} to {to}");
                }
            }
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn int8_embeddings_are_within_half_a_step() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a");
    let targets: Vec<Vec<f32>> = (0..20_u8)
        .map(|i| {
            (0..9_u8)
                .map(|j| (f32::from(i * 9 + j) * 0.7).sin() * f32::from(i))
                .collect()
        })
        .collect();
    let mut writer = DatasetWriter::create(&path, 9, EmbeddingType::Int8).unwrap();
    for target in &targets {
        writer.push(&[1], &[1], target, None).unwrap();
    }
    writer.finish().unwrap();
    for in_memory in [0, 1 << 20] {
        let options = OpenOptions::default().in_memory(in_memory);
        let dataset = Dataset::open_with(&path, options).unwrap();
        for (target, sample) in targets.iter().zip(dataset.iter()) {
            let largest = target.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            for (x, y) in target.iter().zip(sample.unwrap().target()) {
                assert!((x - y).abs() <= largest / 253.9, "{x} {y}");
            }
        }
    }
}

#[test]
fn texts_of_another_file_replace_those_of_a_dataset() {
    let folder = TempDir::new().unwrap();
    let [data, texts] = ["a.efb", "b"].map(|name| folder.path().join(name));
    write_efb1(&data, &samples());
    std::fs::write(&texts, "first\nsecond\nthird\n").unwrap();
    let options = OpenOptions::default().texts(&texts);
    let mut expected = samples();
    for (sample, text) in expected.iter_mut().zip(["first", "second", "third"]) {
        sample.3 = text.into();
    }
    assert_eq!(read(&Dataset::open_with(&data, options).unwrap()), expected);
    for (content, line) in [
        ("first\nsecond\n", "line 2: "),
        ("1\n2\n3\n4\n", "line 4: "),
    ] {
        std::fs::write(&texts, content).unwrap();
        let error = Dataset::open_with(&data, options).unwrap_err();
        assert!(
            matches!(&error, Error::Format { path, reason, .. } if *path == texts && reason.starts_with(line)),
            "{error}"
        );
    }
}

#[test]
fn texts_that_are_not_one_line_are_refused() {
    let folder = TempDir::new().unwrap();
    for text in ["a\nb", "a\r", "\u{feff}a"] {
        let mut record = Record::new(vec![1.0]);
        record.text = Some(text.into());
        let path = folder.path().join("a.txt");
        let error = write(&path, DatasetFormat::Text, &[record.clone()]).unwrap_err();
        assert!(
            matches!(&error, Error::Data { name, .. } if name == "sample 0"),
            "{error}"
        );
        write(
            &path.with_extension("jsonl"),
            DatasetFormat::JsonLines,
            &[record.clone()],
        )
        .unwrap();
        assert_eq!(all(&path.with_extension("jsonl")), [record]);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn large_json_lines_go_to_a_temporary_file() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    let scratch = TempDir::new().unwrap();
    let records: Vec<Record> = (0..500_u32)
        .map(|i| {
            let mut record = Record::new(vec![i as f32, 0.5]);
            record.input_ids = Some(vec![i; 1 + i as usize % 9]);
            record.text = (i % 3 > 0).then(|| "é".repeat(i as usize % 5));
            record
        })
        .collect();
    write(&path, DatasetFormat::JsonLines, &records).unwrap();
    let options = OpenOptions::default().temporary(scratch.path());
    let held = Dataset::open_with(&path, options).unwrap();
    let stored = Dataset::open_with(&path, options.in_memory(5000)).unwrap();
    assert_eq!(read(&held), read(&stored));
    assert_eq!(stored.len(), 500);
    assert_eq!(
        std::fs::read_dir(scratch.path()).unwrap().count(),
        0,
        "it has no name"
    );
    let missing = scratch.path().join("missing");
    let options = options.temporary(&missing).in_memory(5000);
    let error = Dataset::open_with(&path, options).unwrap_err();
    assert!(
        matches!(&error, Error::Io { path, .. } if *path == missing)
            && error.to_string().contains("OpenOptions::temporary"),
        "{error}"
    );
}
