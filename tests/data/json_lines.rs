//! JSON lines: what is accepted, what is refused, as a dataset.

use super::*;

#[test]
fn json_lines_are_read_in_order() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    let lines = concat!(
        r#"{"text": "ört", "target": [0.5, -1]}"#,
        "\n",
        r#"{"input_ids": [3, 4], "attention_mask": [1, 0], "target": [0, 1e-3], "more": null}"#,
    );
    std::fs::write(&path, lines).unwrap();
    let records: Result<Vec<_>, _> = JsonLines::open(&path).unwrap().collect();
    let records = records.unwrap();
    assert_eq!(records.len(), 2);
    assert_eq!(records[0].text.as_deref(), Some("ört"));
    assert_eq!(
        (&records[0].input_ids, &records[0].target),
        (&None, &vec![0.5, -1.0])
    );
    assert_eq!(records[1].input_ids, Some(vec![3, 4]));
    assert_eq!(records[1].attention_mask, Some(vec![1, 0]));
    assert_eq!(records[1].target, [0.0, 1e-3]);
}

#[test]
fn bad_json_lines_are_named() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    let good = r#"{"text": "a", "target": [1]}"#;
    let cases = [
        (r#"{"text": "a", "target": [1}"#, 26, "expected"),
        (r#"{"text""#, 6, "EOF"),
        (r#"[null, null, null, [1]]"#, 0, "not an object"),
        (r#"{"text": "a"}"#, 12, "missing field `target`"),
        (r#"{"text": "a", "target": []}"#, 0, "empty"),
        (r#"{"text": "a", "target": [1, 2]}"#, 0, "first line's 1"),
        (r#"{"text": "a", "target": [1e39]}"#, 0, "not finite"),
        (r#"{"text": "a", "target": [NaN]}"#, 25, "expected value"),
        (r#"{"target": [1]}"#, 0, "neither text nor input_ids"),
        (
            r#"{"text": "a", "attention_mask": [1], "target": [1]}"#,
            0,
            "without input_ids",
        ),
        (
            r#"{"input_ids": [], "target": [1]}"#,
            0,
            "input_ids is empty",
        ),
        (r#"{"input_ids": [-1], "target": [1]}"#, 16, "invalid value"),
        (
            r#"{"input_ids": [10], "target": [1]}"#,
            0,
            "token id 10 is not below the vocabulary size 10",
        ),
        (
            r#"{"input_ids": [1], "attention_mask": [1, 1], "target": [1]}"#,
            0,
            "2 values in attention_mask",
        ),
        (
            r#"{"input_ids": [1], "attention_mask": [2], "target": [1]}"#,
            0,
            "neither 0 nor 1",
        ),
    ];
    for (bad, column, word) in cases {
        std::fs::write(&path, format!("{good}\n{bad}\n{good}\n")).unwrap();
        let options = OpenOptions::default().vocab(10);
        let mut lines = JsonLines::open_with(&path, options).unwrap();
        assert!(lines.next().unwrap().is_ok());
        match lines.next() {
            Some(Err(Error::Format {
                path: named,
                offset,
                reason,
            })) => {
                assert_eq!(named, path);
                assert!(
                    reason.starts_with("line 2: ") && reason.contains(word),
                    "{bad}: {reason}"
                );
                assert_eq!(offset, good.len() as u64 + 1 + column, "{bad}: {reason}");
            }
            other => panic!("{bad}: {other:?}"),
        }
        assert!(lines.next().is_none(), "ends after the first bad line");
    }
}

#[test]
fn marks_blank_lines_and_line_ends_of_json_lines_are_accepted() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    let first = r#"{"input_ids": [3], "target": [0.5]}"#;
    let second = r#"{"input_ids": [4], "target": [1.5]}"#;
    let read_all = |content: &str| {
        std::fs::write(&path, content).unwrap();
        let records: Result<Vec<_>, _> = JsonLines::open(&path).unwrap().collect();
        records.map(|records| {
            let targets = records.into_iter().map(|record| record.target[0]);
            targets.collect::<Vec<f32>>()
        })
    };
    for content in [
        format!("{first}\n{second}"),
        format!("\u{feff}{first}\n{second}\n"),
        format!("\u{feff}\n\n  \t\n{first}\r\n\r\n{second}\r\n\n\n"),
        format!("  {first}  \n {second} \r\n "),
    ] {
        assert_eq!(read_all(&content).unwrap(), [0.5, 1.5], "{content:?}");
        assert_eq!(Dataset::open(&path).unwrap().len(), 2, "{content:?}");
    }
    // Lines and bytes are those of the file, blank lines and mark included.
    for (content, line, at) in [
        ("\u{feff}{\"target\": x}".to_owned(), "line 1: ", 3 + 11),
        (
            format!("\u{feff}\r\n\n{first}\r\n\n{{\"target\": x}}"),
            "line 5: ",
            44 + 11,
        ),
    ] {
        match read_all(&content) {
            Err(Error::Format { offset, reason, .. }) => {
                assert!(reason.starts_with(line), "{reason}");
                assert_eq!(offset, at, "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    // A mark counts at the start of the file alone.
    assert!(read_all(&format!("{first}\n\u{feff}{second}")).is_err());
}

#[test]
fn json_lines_are_a_dataset() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("your data");
    let lines = concat!(
        "\u{feff}\n",
        r#"{"text": "the cat sat", "target": [0.5, -1]}"#,
        "\r\n\r\n",
        r#"{"input_ids": [4, 5], "attention_mask": [1, 0], "target": [0, 1e-3]}"#,
    );
    std::fs::write(&path, lines).unwrap();
    let error = Dataset::open(&path).unwrap_err();
    assert!(
        matches!(&error, Error::Format { offset: 4, reason, .. } if reason.contains("line 2") && reason.contains("tokenizer")),
        "{error}"
    );
    let tokenizer = Whitespace::new(["the", "cat", "sat"], 8).unwrap();
    let options = OpenOptions::default().tokenizer(&tokenizer);
    let dataset = Dataset::open_with(&path, options).unwrap();
    let expected = [
        (
            tokenizer.encode("the cat sat").unwrap(),
            vec![1; 5],
            vec![0.5, -1.0],
            "the cat sat".to_owned(),
        ),
        (vec![4, 5], vec![1, 0], vec![0.0, 1e-3], "-".into()),
    ];
    assert_eq!(read(&dataset), expected);
    assert_eq!((dataset.width(), dataset.path()), (2, path.as_path()));
    assert_eq!(read(&dataset.split(1).1), expected[1..]);
    let mut batches = Batches::evaluation(dataset, 2, 3).unwrap();
    let batch = batches.next_batch().unwrap().unwrap();
    assert_eq!(batch.targets, [0.5, -1.0, 0.0, 1e-3]);
    assert_eq!(batch.mask, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);

    // The vocabulary is the tokenizer's where no other is given.
    std::fs::write(&path, r#"{"input_ids": [7], "target": [1]}"#).unwrap();
    let error = Dataset::open_with(&path, options).unwrap_err();
    assert!(error.to_string().contains("vocabulary size 7"), "{error}");
    assert!(Dataset::open_with(&path, options.vocab(8)).is_ok());

    let (offset, reason) = refusal(&folder, b" { \n", None);
    assert!(
        offset == 1 && reason.starts_with("line 1: EOF"),
        "{offset} {reason}"
    );
}

#[test]
fn a_json_line_without_end_is_not_read_whole() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    std::fs::write(&path, vec![b' '; energyflow::text::jsonl::MAX_LINE + 10]).unwrap();
    match JsonLines::open(&path).unwrap().next() {
        Some(Err(Error::Format {
            offset: 0, reason, ..
        })) => assert!(reason.contains("longer")),
        other => panic!("{other:?}"),
    }
}
