// y, but NaN where x is: `max`, `sqrt` and others may return a number for NaN. From the bits, since compilers may assume that no float is NaN.
fn nan_of(y: f32, x: f32) -> f32 {
    return select(y, x, (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u);
}
