//! Floats as integers of 8 bits with a scale per row.

/// Writes integers of -127 to 127 for a row, and returns their scale: a value is its integer times that. They are rounded to nearest, so that
/// the error of a value is at most 1/254 of the largest one. The scale is not finite if a value is not, or is too large.
pub(crate) fn quantize(row: &[f32], bytes: &mut Vec<u8>) -> f32 {
    let largest = row
        .iter()
        .fold(0.0_f32, |most, value| most.max(value.abs()));
    let scale = largest / 127.0;
    bytes.clear();
    bytes.extend(row.iter().map(|value| match scale > 0.0 {
        // Saturates, and both divisors are positive.
        true => (value / scale).round() as i8 as u8,
        false => 0,
    }));
    scale
}
