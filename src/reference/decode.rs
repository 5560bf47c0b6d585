//! How the next token is chosen, from the definition: sorted lists, and sums of real numbers.

/// What changes the choice, see [`DecodeOptions`](crate::text::DecodeOptions).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 for the most likely token.
    pub temperature: f64,
    /// Number of tokens to draw from; at least as many as there are: all.
    pub top_k: usize,
    /// Probability of the tokens to draw from.
    pub top_p: f64,
    /// 1 changes nothing.
    pub repetition_penalty: f64,
}

impl Sampling {
    /// Scores of all tokens, of which the one with the largest score is next: logits and, where tokens are drawn, Gumbel noise;
    /// −∞ where a token is not in the set that is drawn from. `seen`: tokens that the text already has.
    #[must_use]
    pub fn scores(&self, logits: &[f64], seen: &[u32], stream: Stream, position: u32) -> Vec<f64> {
        let mut scores = logits.to_vec();
        let mut seen = seen.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            let score = &mut scores[token as usize];
            *score = match *score > 0.0 {
                true => *score / self.repetition_penalty,
                false => *score * self.repetition_penalty,
            };
        }
        if self.temperature == 0.0 {
            return scores;
        }
        for score in &mut scores {
            *score /= self.temperature;
        }
        self.keep(&mut scores);
        for (token, score) in scores.iter_mut().enumerate() {
            *score += stream.gumbel(token as u32, position);
        }
        scores
    }

    /// −∞ for tokens that are not drawn.
    pub fn keep(&self, scores: &mut [f64]) {
        let mut sorted = scores.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let kth = sorted[self.top_k.clamp(1, sorted.len()) - 1];
        sorted.retain(|score| *score >= kth);
        let mass: f64 = sorted.iter().map(|score| (score - sorted[0]).exp()).sum();
        let mut sum = 0.0;
        let last = sorted.iter().find(|score| {
            sum += (**score - sorted[0]).exp() / mass;
            sum >= self.top_p
        });
        let least = last.or(sorted.last()).copied().unwrap_or(kth);
        for score in scores.iter_mut().filter(|score| **score < least) {
            *score = f64::NEG_INFINITY;
        }
    }
}

/// The random numbers of one text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stream {
    key: u64,
}

impl Stream {
    /// Text `number` of those with this seed.
    #[must_use]
    pub fn new(seed: u64, number: u64) -> Self {
        Self {
            key: split_mix(split_mix(seed) ^ number),
        }
    }

    /// −ln(−ln u) of a u in (0, 1) for a token at a position, the same whenever it is asked for.
    #[must_use]
    pub fn gumbel(self, token: u32, position: u32) -> f64 {
        let [low, high] = [self.key as u32, (self.key >> 32) as u32];
        let bits = super::dropout::pcg4d([token / 4, position, low, high])[token as usize % 4];
        let rest = (f64::from(bits >> 9) + 0.5) / f64::from(1 << 23);
        -(-(-rest).ln_1p()).ln()
    }
}

/// Steele, Lea & Flood, OOPSLA 2014.
fn split_mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
