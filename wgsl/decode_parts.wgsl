// A part of a row of logits, {{ span }} `vec4`s: its largest logit, the sum of exp(logit - it), its largest score and the first index of that. A
// workgroup per part: without parts, as few workgroups as there are rows would read the logits.
{# Inside: row < rows, col is clamped to the {{ used }} columns of logits; {{ parts }} parts are stored per row. Words of options and seen as in
   decode_sample. #}
{% set fold = 16 if size >= 256 else 8 %}
{% set groups = size // fold %}
{% include "shared/group" %}
{% include "shared/scores" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let number = group_id(wid);
    if (number >= {{ rows * parts }}u) {
        return;
    }
    let row = number / {{ parts }}u;
    let begin = number % {{ parts }}u * {{ span }}u;
    var part = beginning();
    for (var col = begin + lid; col < min(begin + {{ span }}u, {{ used }}u); col += {{ size }}u) {
        let x = logits_of(row, col);
        part = with_four(part, x, scores_of(x, row, col), col);
    }
    let whole = all_join(packed(part), lid);
    if (lid == 0u) {
        parts_store(row * parts_stride + number % {{ parts }}u, whole);
    }
}
