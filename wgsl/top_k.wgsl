// The {{ k }} best of every piece of a row, best first: {{ size }} invocations, {{ each }} numbers each. Of equal numbers the one with the lower
// index is better, so that no two are equal and ranks are unique.
// The {{ k }} best numbers belong to the {{ k }} invocations whose own best numbers are best: those copy their numbers to a list, where
// the ranks are counted.
{# Inside: numbers are read at columns below cols. y and place have k elements for each piece of a row, and what follows the last up to their
   stride. A rank below k is that of one invocation, or of one number, since size ≥ k and no two are equal. #}
{% include "shared/group" %}
{% include "shared/better" %}

var<workgroup> best: array<f32, {{ size }}>;
var<workgroup> best_index: array<u32, {{ size }}>;
var<workgroup> list: array<f32, {{ each * k }}>;
var<workgroup> list_index: array<u32, {{ each * k }}>;

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let number = group_id(wid);
    if (number >= {{ rows * pieces }}u) {
        return;
    }
    let row = number / {{ pieces }}u;
    let piece = number % {{ pieces }}u;
    let first = piece * {{ size * each }}u + lid;
    var own = value_at(row, first);
    var own_index = index_at(row, first);
    for (var i = 1u; i < {{ each }}u; i++) {
        let value = value_at(row, first + i * {{ size }}u);
        let index = index_at(row, first + i * {{ size }}u);
        if (is_better(value, index, own, own_index)) {
            own = value;
            own_index = index;
        }
    }
    best[lid] = own;
    best_index[lid] = own_index;
    workgroupBarrier();
    var rank = 0u;
    for (var i = 0u; i < {{ size }}u; i++) {
        rank += u32(is_better(best[i], best_index[i], own, own_index));
    }
    if (rank < {{ k }}u) {
        for (var i = 0u; i < {{ each }}u; i++) {
            list[rank * {{ each }}u + i] = value_at(row, first + i * {{ size }}u);
            list_index[rank * {{ each }}u + i] = index_at(row, first + i * {{ size }}u);
        }
    }
    workgroupBarrier();
    for (var i = lid; i < {{ each * k }}u; i += {{ size }}u) {
        own = list[i];
        own_index = list_index[i];
        rank = 0u;
        for (var other = 0u; other < {{ each * k }}u; other++) {
            rank += u32(is_better(list[other], list_index[other], own, own_index));
        }
        if (rank < {{ k }}u) {
            y_put(row * y_stride + piece * {{ k }}u + rank, own);
            place_put(row * place_stride + piece * {{ k }}u + rank, own_index);
        }
    }
    if (piece == {{ pieces - 1 }}u) {
        for (var i = {{ pieces * k }}u + lid; i < y_stride; i += {{ size }}u) {
            y_put(row * y_stride + i, 0.0);
            place_put(row * place_stride + i, 0u);
        }
    }
}
