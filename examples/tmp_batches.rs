use energyflow::text::{Batches, Dataset};
use std::time::Instant;
fn main() {
    let t = Instant::now();
    let data = Dataset::open(std::env::args().nth(1).unwrap()).unwrap();
    println!("open {:?}", t.elapsed());
    let mut batches = Batches::training(data, 64, 32, 1).unwrap();
    for epoch in 0..6 {
        batches.start_epoch(epoch);
        let t = Instant::now();
        let mut n = 0;
        while let Some(b) = batches.next_batch().unwrap() {
            n += b.ids.len();
        }
        let s = t.elapsed().as_secs_f64();
        println!(
            "{n} tokens in {s:.4} s: {:.1} M tokens/s, {:.1} us per batch",
            n as f64 / s / 1e6,
            s * 1e6 / (n as f64 / 2048.0)
        );
    }
}
