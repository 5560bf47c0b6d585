//! Random numbers: what they depend on, and how they are distributed.

use energyflow::reference::Sampling;
use energyflow::text::DecodeOptions;

use super::{noise, small};

#[test]
fn many_texts_are_as_many_single_ones() {
    let (_, decoder) = small();
    let n = 70;
    let z = noise(n * 7, 11);
    let drawn = DecodeOptions::default()
        .max_len(20)
        .temperature(1.2)
        .top_k(Some(12))
        .seed(5);
    for options in [DecodeOptions::default().max_len(20), drawn] {
        let all = decoder.decode(&z, &options).unwrap();
        assert_eq!(all.len(), n);
        for (i, z) in z.chunks(7).enumerate().step_by(9) {
            let alone = options.clone().first_stream(i as u64);
            let alone = decoder.decode(z, &alone).unwrap();
            assert_eq!(alone[0].tokens, all[i].tokens, "{i}");
            assert_eq!(alone[0].finish, all[i].finish);
        }
        let async_ = pollster::block_on(decoder.decode_async(&z, &options)).unwrap();
        assert_eq!(async_, all);
    }
}

/// Texts of equal embeddings differ, another seed gives others, and the same one the same.
#[test]
fn seeds_and_streams() {
    let (_, decoder) = small();
    let z = noise(7, 1).repeat(3);
    let options = DecodeOptions::default().temperature(1.5).max_len(20);
    let first = decoder.decode(&z, &options).unwrap();
    assert_ne!(first[0].tokens, first[1].tokens);
    assert_eq!(first, decoder.decode(&z, &options).unwrap());
    let other = decoder.decode(&z, &options.clone().seed(1)).unwrap();
    assert_ne!(first[0].tokens, other[0].tokens);
    let shifted = decoder.decode(&z, &options.first_stream(1)).unwrap();
    assert_eq!(shifted[..2], first[1..]);
}

/// Draws are distributed as the definition says.
#[test]
fn draws_follow_the_distribution() {
    let (whole, decoder) = small();
    let n = 4096;
    let z = noise(7, 6);
    let logits = whole.logits(&z, &[])[0].clone();
    let all = z.repeat(n);
    let plain = DecodeOptions::default().max_len(1).temperature(0.9).seed(8);
    let cases = [
        plain.clone(),
        plain.clone().top_k(Some(5)),
        plain.clone().temperature(2.0).top_p(0.7),
    ];
    for options in cases {
        let sampling = Sampling {
            temperature: f64::from(options.temperature),
            top_k: options.top_k.unwrap_or(usize::MAX),
            top_p: f64::from(options.top_p),
            repetition_penalty: 1.0,
        };
        let mut scores: Vec<f64> = logits.iter().map(|x| x / sampling.temperature).collect();
        sampling.keep(&mut scores);
        let mass: f64 = scores.iter().map(|x| x.exp()).sum();
        let mut counts = vec![0_usize; scores.len()];
        for generation in decoder.decode(&all, &options).unwrap() {
            // The end token is no part of a text.
            counts[generation.tokens.first().copied().unwrap_or(3) as usize] += 1;
        }
        let (mut chi, mut classes) = (0.0, 0);
        let (mut rest, mut rest_count) = (0.0, 0.0);
        for (score, &count) in scores.iter().zip(&counts) {
            let expected = n as f64 * score.exp() / mass;
            assert!(expected > 0.0 || count == 0);
            match expected >= 5.0 {
                true => {
                    chi += (count as f64 - expected).powi(2) / expected;
                    classes += 1;
                }
                false => {
                    rest += expected;
                    rest_count += count as f64;
                }
            }
        }
        if rest > 1.0 {
            chi += (rest_count - rest).powi(2) / rest;
            classes += 1;
        }
        // Five standard deviations.
        let freedom = f64::from(classes - 1);
        assert!(classes > 3, "{classes}");
        assert!(
            chi < freedom + 5.0 * (2.0 * freedom).sqrt(),
            "{chi} {classes}"
        );
    }
}
