// Below every logit but -infinity, so that x - LOWEST is never infinity - infinity.
const LOWEST: f32 = -3.4028234e38;

// y, but NaN where a row has no softmax, given its maximum, at least LOWEST, and the sum of exp(x - maximum): where it holds NaN, +infinity
// or nothing but -infinity. Otherwise the largest logit adds 1 to the sum. From the bits, since compilers may assume that no float is NaN.
fn if_softmax(y: f32, top: f32, sum: f32) -> f32 {
    let bits = bitcast<u32>(sum);
    let exists = bits >= 0x3f000000u && bits <= 0x7f800000u && bitcast<u32>(top) != 0x7f800000u;
    // A variable: WebGPU refuses constants that are no finite number.
    var nan = 0x7fc00000u;
    return select(bitcast<f32>(nan), y, exists);
}
