// The {{ k }} best of every piece of {{ span }} numbers of a row, best first: one invocation per number, which counts the better ones and stops
// at {{ k }}. Of equal numbers the one with the lower index is better, so that no two are equal and ranks are unique. Without barriers.
{# Inside: numbers are read at columns below cols. y and place have k elements for each piece of a row, and what follows the last up to their
   stride. A rank below k is that of one number of a piece. #}
{% include "shared/group" %}
{% include "shared/better" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let number = group_id(wid) * {{ size }}u + lid;
    if (number >= {{ rows * pieces * span }}u) {
        return;
    }
    let row = number / {{ pieces * span }}u;
    let piece = number / {{ span }}u % {{ pieces }}u;
    let first = piece * {{ span }}u;
    let own = value_at(row, first + number % {{ span }}u);
    let own_index = index_at(row, first + number % {{ span }}u);
    var rank = 0u;
    for (var i = 0u; i < {{ span }}u; i++) {
        rank += u32(is_better(value_at(row, first + i), index_at(row, first + i), own, own_index));
        if (rank >= {{ k }}u) {
            break;
        }
    }
    if (rank < {{ k }}u) {
        y_put(row * y_stride + piece * {{ k }}u + rank, own);
        place_put(row * place_stride + piece * {{ k }}u + rank, own_index);
    }
    if (piece == {{ pieces - 1 }}u && number % {{ span }}u == 0u) {
        for (var i = {{ pieces * k }}u; i < y_stride; i++) {
            y_put(row * y_stride + i, 0.0);
            place_put(row * place_stride + i, 0u);
        }
    }
}
