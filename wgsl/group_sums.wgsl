// Sum, or masked mean, over each run of `period` rows: an invocation a vec4 of the result.
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var sum = vec4<f32>();
{% if masked %}
    var count = 0.0;
{% endif %}
    if (col < {{ used }}u) {
        for (var t = row * {{ period }}u; t < (row + 1u) * {{ period }}u; t++) {
{% if masked %}
            let m = mask_at(t);
            count += m;
            sum += m * x_load(t * x_stride + col);
{% else %}
            sum += x_load(t * x_stride + col);
{% endif %}
        }
    }
{% if masked %}
    sum = sum / max(count, 1.0);
{% endif %}
    finish(row, col, sum);
}
