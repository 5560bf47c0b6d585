// Adds up the parts of a product whose K was split, in a fixed order: an invocation a vec4 of the result, eight parts a step if there are many.
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var sum = vec4<f32>();
    if (col < {{ used }}u) {
{% set eights = splits // 8 if splits >= 16 else 0 %}
{% if eights > 0 %}
        for (var eight = 0u; eight < {{ eights }}u; eight++) {
            let at = (eight * {{ 8 * rows }}u + row) * x_stride + col;
{% for n in range(8) %}
            let v{{ n }} = x_load(at + {{ n * rows }}u * x_stride);
{% endfor %}
            sum += ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7));
        }
{% endif %}
        for (var part = {{ 8 * eights }}u; part < {{ splits }}u; part++) {
            sum += x_load((part * {{ rows }}u + row) * x_stride + col);
        }
    }
    finish(row, col, sum);
}
