// One pass over the logits with an online maximum. Per row: logsumexp and loss. An invocation takes {{ (used + lanes - 1) // lanes }} steps,
// whose sums it adds up in blocks of {{ block }}.
{# Inside: row is at most the last one, col < used. A target is a column only after it was compared with the number of columns. rows has two
   rows; bound from its element `first` on, for a chunk of the logits, its end is that of the value: first + stride + row is still in the
   second. scratch: lid + s stays inside a row's lanes, for lane < s. #}
{% include "shared/group" %}
{% include "shared/softmax" %}

{% if lanes > 1 %}
var<workgroup> scratch: array<vec3<f32>, {{ size }}>;

// (maximum, sum of exp(x - maximum), sum of x) of two disjoint parts.
fn join(a: vec3<f32>, b: vec3<f32>) -> vec3<f32> {
    let top = max(a.x, b.x);
    return vec3<f32>(top, a.y * exp(a.x - top) + b.y * exp(b.x - top), a.z + b.z);
}
{% endif %}

{# Adds `vec4` number col to `part`. #}
{% macro add() %}
        let v = logits_load(row * logits_stride + col);
{% if cols % 4 == 0 %}
        let top = max(part.x, max(max(v.x, v.y), max(v.z, v.w)));
        let e = exp(v - top);
        part = vec3<f32>(top, part.y * exp(part.x - top) + ((e.x + e.y) + (e.z + e.w)), part.z + ((v.x + v.y) + (v.z + v.w)));
{% else %}
        let valid = vec4<u32>(0u, 1u, 2u, 3u) + 4u * col < vec4<u32>({{ cols }}u);
        let w = select(vec4<f32>(LOWEST), v, valid);
        let top = max(part.x, max(max(w.x, w.y), max(w.z, w.w)));
        let e = select(vec4<f32>(), exp(w - top), valid);
        let s = select(vec4<f32>(), v, valid);
        part = vec3<f32>(top, part.y * exp(part.x - top) + ((e.x + e.y) + (e.z + e.w)), part.z + ((s.x + s.y) + (s.z + s.w)));
{% endif %}
{% endmacro %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    var part = vec3<f32>(LOWEST, 0.0, 0.0);
{% if used > block * lanes %}
    // Four sums of blocks take turns.
    var sums = vec4<f32>();
    var plain = vec4<f32>();
    for (var begin = lane; begin < {{ used }}u; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, {{ used }}u);
        let before = part.x;
        part = vec3<f32>(before, 0.0, 0.0);
        for (var col = begin; col < stop; col += {{ lanes }}u) {
{{ add() }}
        }
        sums *= exp(before - part.x);
        sums = vec4<f32>(sums.yzw, sums.x + part.y);
        plain = vec4<f32>(plain.yzw, plain.x + part.z);
    }
    part = vec3<f32>(part.x, (sums.x + sums.y) + (sums.z + sums.w), (plain.x + plain.y) + (plain.z + plain.w));
{% else %}
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
{{ add() }}
    }
{% endif %}
{% if lanes > 1 %}
    scratch[lid] = part;
    workgroupBarrier();
    for (var s = {{ lanes // 2 }}u; s > 0u; s = s >> 1u) {
        if (lane < s) {
            scratch[lid] = join(scratch[lid], scratch[lid + s]);
        }
        workgroupBarrier();
    }
    part = scratch[lid - lane];
{% endif %}
    if (wanted < {{ rows }}u && lane == 0u) {
        let lse = if_softmax(part.x + log(part.y), part.x, part.y);
        let target_id = targets_at(row);
        var loss = 0.0;
        if (target_id < {{ cols }}u{% if ignore >= 0 %} && target_id != {{ ignore }}u{% endif %}) {
            let x = logits_load(row * logits_stride + (target_id >> 2u))[target_id & 3u];
            // Relative to the maximum, so that large logits do not swallow a small loss.
            loss = log(part.y) + {{ 1.0 - smoothing }} * (part.x - x){% if smoothing > 0 %} + {{ smoothing }} * (part.x - part.z / {{ cols }}.0){% endif %};
            loss = if_softmax(loss, part.x, part.y);
        }
        rows_put(row, lse);
        rows_put(rows_stride + row, loss);
{% if pad > 0 %}
        if (row == {{ rows - 1 }}u) {
            for (var i = {{ rows }}u; i < {{ rows + pad }}u; i++) {
                rows_put(i, 0.0);
                rows_put(rows_stride + i, 0.0);
            }
        }
{% endif %}
    }
}
