{% include "shared/group" %}
{% include "shared/nan" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var dx = vec4<f32>();
    let target_id = targets_at(row);
    if (col < {{ used }}u && target_id < {{ cols }}u{% if ignore >= 0 %} && target_id != {{ ignore }}u{% endif %}) {
        let lse = rows_at(row);
        let p = exp(logits_load(row * logits_stride + col) - lse);
        let hot = vec4<u32>(0u, 1u, 2u, 3u) + 4u * col == vec4<u32>(target_id);
        let wanted = select(vec4<f32>(), vec4<f32>({{ 1.0 - smoothing }}), hot) + {{ smoothing }} / {{ cols }}.0;
        // Without a softmax the logsumexp is NaN, which the exponential may hide.
        dx = (p - wanted) * nan_of(dloss_at(0u) / max(count_at(0u), 1.0), lse);
    }
    finish(row, col, dx);
}
